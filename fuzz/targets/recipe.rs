//! See [`fairway_fuzz::hostile::recipe`].
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| fairway_fuzz::hostile::recipe(input));

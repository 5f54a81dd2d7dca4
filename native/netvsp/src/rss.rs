//! Receive-side scaling: which queue of a NIC a frame goes to, by the guest's key and indirection table.
//!
//! `netvsp/rss.py` is the document of record. The hash is computed from tables that are made once per key: one lookup
//! for each half byte of addresses and ports.

use crate::checksum::{find_transport, is_tag, Transport, TCP, UDP};

pub const KEY_BYTES: usize = 40;
/// Hash function number of Toeplitz in NDIS hash information.
pub(crate) const TOEPLITZ: u32 = 1;
/// Headers are looked for in the first bytes alone.
const HEAD: usize = 128;
/// Two IPv6 addresses and two ports.
const INPUT: usize = 36;

const HASH_IPV4: u32 = 0x100;
const HASH_TCP_IPV4: u32 = 0x200;
const HASH_UDP_IPV4: u32 = 0x4000;
const HASH_IPV6: u32 = 0x400;
const HASH_TCP_IPV6: u32 = 0x1000;
const HASH_UDP_IPV6: u32 = 0x8000;
const HASH_IPV6_EX: u32 = 0x800;
const HASH_TCP_IPV6_EX: u32 = 0x2000;
const HASH_UDP_IPV6_EX: u32 = 0x1_0000;

/// A frame's place among the queues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Placed {
    pub(crate) queue: usize,
    pub(crate) value: u32,
    /// The NDIS_HASH_* type that applied.
    pub(crate) kind: u32,
}

/// The guest's key, table and hash types; immutable.
pub(crate) struct Rss {
    /// For each half byte of the input and each of its values, what it adds to the hash.
    halves: Vec<[u32; 16]>,
    table: Vec<u32>,
    types: u32,
}

impl Rss {
    /// None for an empty table.
    pub(crate) fn new(key: &[u8; KEY_BYTES], table: Vec<u32>, types: u32) -> Option<Self> {
        if table.is_empty() {
            return None;
        }
        let halves = (0..2 * INPUT)
            .map(|half| {
                let mut sums = [0; 16];
                for (value, sum) in sums.iter_mut().enumerate() {
                    for bit in 0..4 {
                        if value >> (3 - bit) & 1 == 1 {
                            *sum ^= window(key, half * 4 + bit);
                        }
                    }
                }
                sums
            })
            .collect();
        Some(Rss {
            halves,
            table,
            types,
        })
    }

    /// None = nothing that the guest wants hashed.
    pub(crate) fn place(&self, head: &[u8]) -> Option<Placed> {
        let head = head.get(..HEAD).unwrap_or(head);
        let mut input = [0; INPUT];
        let (kind, length) = flow(head, self.types, &mut input)?;
        let value = self.hash(&input[..length]);
        let queue = *self.table.get(value as usize % self.table.len())?;
        Some(Placed {
            queue: queue as usize,
            value,
            kind,
        })
    }

    fn hash(&self, data: &[u8]) -> u32 {
        let pairs = data.iter().zip(self.halves.chunks_exact(2));
        pairs.fold(0, |sum, (byte, pair)| {
            sum ^ pair[0][usize::from(byte >> 4)] ^ pair[1][usize::from(byte & 15)]
        })
    }
}

/// 32 bits of the key from bit `at` on; bits behind its end are zero.
fn window(key: &[u8; KEY_BYTES], at: usize) -> u32 {
    let byte = |index: usize| u64::from(key.get(index).copied().unwrap_or(0));
    let first = at / 8;
    let bits = (0..5).fold(0, |sum, index| sum << 8 | byte(first + index));
    (bits >> (8 - at % 8)) as u32
}

/// Puts what is to be hashed of a frame into `input`; its type and length.
fn flow(head: &[u8], types: u32, input: &mut [u8; INPUT]) -> Option<(u32, usize)> {
    let (ipv6, start) = network(head)?;
    let pick = |plain: u32, extended: u32| {
        if types & plain != 0 {
            plain
        } else {
            types & extended
        }
    };
    let (addresses, tcp, udp, plain) = if ipv6 {
        (
            head.get(start + 8..start + 40)?,
            pick(HASH_TCP_IPV6, HASH_TCP_IPV6_EX),
            pick(HASH_UDP_IPV6, HASH_UDP_IPV6_EX),
            pick(HASH_IPV6, HASH_IPV6_EX),
        )
    } else {
        (
            head.get(start + 12..start + 20)?,
            types & HASH_TCP_IPV4,
            types & HASH_UDP_IPV4,
            types & HASH_IPV4,
        )
    };
    let length = addresses.len();
    input[..length].copy_from_slice(addresses);
    if let Some(Transport {
        protocol,
        l4_offset,
        ..
    }) = find_transport(head)
    {
        let kind = match protocol {
            TCP => tcp,
            UDP => udp,
            _ => 0,
        };
        if let (true, Some(ports)) = (kind != 0, head.get(l4_offset..l4_offset + 4)) {
            input[length..length + 4].copy_from_slice(ports);
            return Some((kind, length + 4));
        }
    }
    (plain != 0).then_some((plain, length))
}

/// Whether it is IPv6, and where the IP header starts; the whole fixed header is there.
fn network(head: &[u8]) -> Option<(bool, usize)> {
    let word = |at: usize| Some(u16::from_be_bytes([*head.get(at)?, *head.get(at + 1)?]));
    let mut start = 14;
    let mut ethertype = word(12)?;
    if is_tag(ethertype) {
        start = 18;
        ethertype = word(16)?;
    }
    let (version, size) = match ethertype {
        0x0800 => (4, 20),
        0x86DD => (6, 40),
        _ => return None,
    };
    let header = head.get(start..start + size)?;
    (header[0] >> 4 == version).then_some((version == 6, start))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// "Verifying the RSS hash calculation", Windows driver documentation.
    const KEY: [u8; KEY_BYTES] = [
        0x6d, 0x5a, 0x56, 0xda, 0x25, 0x5b, 0x0e, 0xc2, 0x41, 0x67, 0x25, 0x3d, 0x43, 0xa3, 0x8f,
        0xb0, 0xd0, 0xca, 0x2b, 0xcb, 0xae, 0x7b, 0x30, 0xb4, 0x77, 0xcb, 0x2d, 0xa3, 0x80, 0x30,
        0xf2, 0x0c, 0x6a, 0x42, 0xb7, 0x3b, 0xbe, 0xac, 0x01, 0xfa,
    ];

    #[test]
    fn the_published_values_come_out() {
        let rss = Rss::new(&KEY, vec![0], HASH_IPV4).unwrap();
        // 66.9.149.187:2794 -> 161.142.100.80:1766
        let input = [66, 9, 149, 187, 161, 142, 100, 80, 0x0A, 0xEA, 0x06, 0xE6];
        assert_eq!(rss.hash(&input[..8]), 0x323e_8fc2);
        assert_eq!(rss.hash(&input), 0x51cc_c178);
    }
}

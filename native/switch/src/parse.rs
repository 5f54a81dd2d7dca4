//! Reads a frame's headers into its flow key. The twin of `vswitch/engine/python/parse.py`, rule for rule.

use crate::endpoint::{FrameRef, HEAD_BYTES};
use crate::fields::{self, Key};

pub const ETHERNET_HEADER: usize = 14;
const GROUP_BIT: u64 = 1 << 40;
pub const BROADCAST: u64 = 0xFFFF_FFFF_FFFF;

const TYPE_VLAN: u16 = 0x8100;
const TYPE_IPV4: u16 = 0x0800;
const TYPE_IPV6: u16 = 0x86DD;
const TYPE_ARP: u16 = 0x0806;
const PROTO_ICMP: u8 = 1;
const PROTO_TCP: u8 = 6;
const PROTO_UDP: u8 = 17;
const PROTO_FRAGMENT: u8 = 44;
const PROTO_ICMPV6: u8 = 58;
const MAX_EXTENSION_HEADERS: usize = 8;

/// What the switch knows of a frame besides its bytes.
#[derive(Clone, Copy, Debug)]
pub struct Packet {
    pub id: u64,
    pub in_port: u32,
    pub length: usize,
    /// Bytes behind the Ethernet header and the VLAN tag.
    pub l3_length: usize,
    pub key: Key,
    /// False: cut short or contradictory headers, so never cached.
    pub regular: bool,
    pub source: u64,
    pub destination: u64,
    /// 0 for untagged and priority-tagged frames.
    pub vlan_id: u16,
    pub mss: u32,
}

impl Packet {
    /// A frame not parsed yet.
    pub fn new(id: u64, in_port: u32, frame: &FrameRef<'_>) -> Self {
        Packet {
            id,
            in_port,
            length: frame.length,
            l3_length: 0,
            key: Key::default(),
            regular: true,
            source: 0,
            destination: 0,
            vlan_id: 0,
            mss: frame.meta.offload.mss,
        }
    }
}

/// Whether the address is a group address (broadcast included).
pub fn is_group(address: u64) -> bool {
    address & GROUP_BIT != 0
}

/// Fills in the packet's key. The frame must have at least 14 bytes.
pub fn parse(packet: &mut Packet, frame: &FrameRef<'_>) {
    let head = &frame.head[..frame.head.len().min(HEAD_BYTES)];
    let key = &mut packet.key;
    key.set(fields::IN_PORT, u64::from(packet.in_port));
    key.set(fields::FRAME_LEN, packet.length as u64);
    packet.destination = be(head, 0, 6);
    packet.source = be(head, 6, 6);
    key.set(fields::ETH_DST, packet.destination);
    key.set(fields::ETH_SRC, packet.source);
    let mut eth_type = be(head, 12, 2) as u16;
    let mut offset = ETHERNET_HEADER;
    let mut tci = None;
    if let Some(beside) = frame.meta.vlan_tci {
        tci = Some(beside);
    } else if eth_type == TYPE_VLAN {
        if packet.length >= offset + 4 {
            tci = Some(be(head, 14, 2) as u16);
            eth_type = be(head, 16, 2) as u16;
            offset += 4;
        } else {
            packet.regular = false;
        }
    }
    packet.vlan_id = tci.unwrap_or(0) & 0xFFF;
    key.set(fields::VLAN_TCI, tci.map_or(fields::NO_VLAN, u64::from));
    key.set(fields::ETH_TYPE, u64::from(eth_type));
    packet.l3_length = packet.length - offset;
    match eth_type {
        TYPE_IPV4 => packet.regular = ipv4(packet, head, offset).is_some(),
        TYPE_IPV6 => packet.regular = ipv6(packet, head, offset).is_some(),
        TYPE_ARP => packet.regular = arp(packet, head, offset).is_some(),
        _ => {}
    }
}

/// Big-endian integer of up to 8 bytes; bytes that are not there count as absent at the end, like a short slice.
fn be(head: &[u8], start: usize, count: usize) -> u64 {
    head.iter()
        .skip(start)
        .take(count)
        .fold(0, |value, byte| value << 8 | u64::from(*byte))
}

fn be128(bytes: &[u8]) -> u128 {
    bytes
        .iter()
        .fold(0, |value, byte| value << 8 | u128::from(*byte))
}

fn arp(packet: &mut Packet, head: &[u8], offset: usize) -> Option<()> {
    let arp = head.get(offset..offset + 28)?;
    if arp[..6] != [0, 1, 8, 0, 6, 4] {
        return None;
    }
    packet.key.set(fields::ARP_OP, be(arp, 6, 2));
    packet.key.set_address(fields::IP_SRC, be128(&arp[14..18]));
    packet.key.set_address(fields::IP_DST, be128(&arp[24..28]));
    Some(())
}

fn ipv4(packet: &mut Packet, head: &[u8], offset: usize) -> Option<()> {
    let ip = head.get(offset..offset + 20)?;
    if ip[0] >> 4 != 4 {
        return None;
    }
    let header = usize::from(ip[0] & 0xF) * 4;
    // Senders of large sends leave the length to the device.
    let total = if packet.mss != 0 {
        packet.l3_length
    } else {
        be(ip, 2, 2) as usize
    };
    if header < 20 || total < header || total > packet.l3_length {
        return None;
    }
    let key = &mut packet.key;
    key.set(fields::IP_DSCP, u64::from(ip[1] >> 2));
    key.set(fields::IP_TTL, u64::from(ip[8]));
    key.set(fields::IP_PROTO, u64::from(ip[9]));
    key.set_address(fields::IP_SRC, be128(&ip[12..16]));
    key.set_address(fields::IP_DST, be128(&ip[16..20]));
    let fragment = be(ip, 6, 2);
    if fragment & 0x1FFF != 0 {
        key.set(fields::IP_FRAG, 2);
        return Some(());
    }
    key.set(fields::IP_FRAG, u64::from(fragment & 0x2000 != 0));
    l4(key, head, ip[9], offset + header, total - header)
}

fn ipv6(packet: &mut Packet, head: &[u8], offset: usize) -> Option<()> {
    let ip = head.get(offset..offset + 40)?;
    if ip[0] >> 4 != 6 {
        return None;
    }
    let most = packet.l3_length - 40;
    let mut left = if packet.mss != 0 {
        most
    } else {
        be(ip, 4, 2) as usize
    };
    if left > most {
        return None;
    }
    let key = &mut packet.key;
    key.set(fields::IP_DSCP, u64::from((ip[0] & 0xF) << 2 | ip[1] >> 6));
    key.set(fields::IP_TTL, u64::from(ip[7]));
    key.set_address(fields::IP_SRC, be128(&ip[8..24]));
    key.set_address(fields::IP_DST, be128(&ip[24..40]));
    let mut proto = ip[6];
    let mut at = offset + 40;
    for _ in 0..MAX_EXTENSION_HEADERS {
        let size = match proto {
            0 | 43 | 60 => {
                let header = head.get(at..at + 8).filter(|_| left >= 8)?;
                (usize::from(header[1]) + 1) * 8
            }
            PROTO_FRAGMENT => {
                let header = head.get(at..at + 8).filter(|_| left >= 8)?;
                let fragment = be(header, 2, 2);
                if fragment & 0xFFF8 != 0 {
                    key.set(fields::IP_PROTO, u64::from(header[0]));
                    key.set(fields::IP_FRAG, 2);
                    return Some(());
                }
                if fragment & 1 != 0 {
                    key.set(fields::IP_FRAG, 1);
                }
                8
            }
            _ => {
                key.set(fields::IP_PROTO, u64::from(proto));
                return l4(key, head, proto, at, left);
            }
        };
        if size > left {
            return None;
        }
        proto = head[at];
        at += size;
        left -= size;
    }
    None
}

/// `left` bytes of the IP packet begin at `offset`.
fn l4(key: &mut Key, head: &[u8], proto: u8, offset: usize, left: usize) -> Option<()> {
    match proto {
        PROTO_TCP => {
            let tcp = head.get(offset..offset + 20).filter(|_| left >= 20)?;
            let header = usize::from(tcp[12] >> 4) * 4;
            if header < 20 || header > left {
                return None;
            }
            key.set(fields::TCP_FLAGS, u64::from(tcp[13]));
        }
        PROTO_UDP => {
            head.get(offset..offset + 8).filter(|_| left >= 8)?;
        }
        PROTO_ICMP | PROTO_ICMPV6 => {
            let icmp = head.get(offset..offset + 4).filter(|_| left >= 4)?;
            key.set(fields::ICMP_TYPE, u64::from(icmp[0]));
            key.set(fields::ICMP_CODE, u64::from(icmp[1]));
            return Some(());
        }
        _ => return Some(()),
    }
    key.set(fields::L4_SRC, be(head, offset, 2));
    key.set(fields::L4_DST, be(head, offset + 2, 2));
    Some(())
}

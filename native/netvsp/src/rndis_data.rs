//! RNDIS PACKET messages to frames and back (MS-RNDIS 2.2.14; per-packet info: ntddndis.h).
//!
//! All input is a private copy. Offsets inside a message are relative to its byte 8.

use vswitch_switch::endpoint::{Checksum, Meta, Offload, MAX_FRAME};
use vswitch_wire::rndis::{
    packet_header, PacketHeader, PpiIter, IEEE_8021Q_INFO, NBL_HASH_INFO, NBL_HASH_VALUE,
    PACKET_HEADER_SIZE, PPI_HEADER_SIZE, RNDIS_PKTINFO_ID, RNDIS_PKTINFO_INTERNAL,
    TCPIP_CHKSUM_PKTINFO, TCP_LARGESEND_PKTINFO,
};

use crate::checksum::{find_transport, Transport, TCP, UDP};
use crate::limits::{ETHERNET_HEADER, MAX_SEGMENTS};
use crate::rss::{Placed, TOEPLITZ};

const TX_TCP: u32 = 4;
const TX_UDP: u32 = 8;
const TX_IP_HEADER: u32 = 16;
const LSO_V2: u32 = 1 << 30;
const RECORD: usize = PPI_HEADER_SIZE + 4;
const MAX_RECORDS: usize = 5;

/// A guest's message that breaks the format; the packet is answered with NVSP status 2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Malformed;

pub(crate) fn le32(data: &[u8], at: usize) -> Option<u32> {
    let bytes = data.get(at..at.checked_add(4)?)?;
    Some(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
}

/// Where the parts of the message at the start of `prefix` are; `available` bytes of it exist.
pub(crate) fn parse_header(prefix: &[u8], available: usize) -> Result<PacketHeader, Malformed> {
    let header = PacketHeader::parse(prefix, available).map_err(|_| Malformed)?;
    if (ETHERNET_HEADER..=MAX_FRAME).contains(&header.data_length) {
        Ok(header)
    } else {
        Err(Malformed)
    }
}

/// Values of the records that the data path acts upon.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Info {
    checksum: Option<u32>,
    lso: Option<u32>,
    vlan: Option<u32>,
    hash: Option<u32>,
}

/// Per-packet info records; of two of one type the later counts, and it must have a value.
pub(crate) fn parse_info(area: &[u8]) -> Result<Info, Malformed> {
    // Outer: is there such a record; inner: has it a value.
    let mut found: [Option<Option<u32>>; 4] = [None; 4];
    for record in PpiIter::new(area) {
        let record = record.map_err(|_| Malformed)?;
        let place = match record.kind {
            TCPIP_CHKSUM_PKTINFO => 0,
            TCP_LARGESEND_PKTINFO => 1,
            IEEE_8021Q_INFO => 2,
            NBL_HASH_VALUE => 3,
            _ => continue,
        };
        found[place] = Some(record.value());
    }
    let value = |record: Option<Option<u32>>| match record {
        Some(None) => Err(Malformed),
        Some(value) => Ok(value),
        None => Ok(None),
    };
    Ok(Info {
        checksum: value(found[0])?,
        lso: value(found[1])?,
        vlan: value(found[2])?,
        hash: value(found[3])?,
    })
}

/// What accompanies a frame of `length` bytes that starts with `head`, and the place of an IPv4 header checksum that is
/// to be filled in. A head that is not the whole frame must hold all headers: else this fails, though the frame is good.
pub(crate) fn apply(
    head: &[u8],
    length: usize,
    info: &Info,
) -> Result<(Meta, Option<Transport>), Malformed> {
    let mut meta = Meta {
        offload: Offload::default(),
        vlan_tci: info.vlan.map(tci_from_info),
        hash: info.hash,
    };
    let mut fill = None;
    match (info.lso, info.checksum) {
        (Some(lso), _) if lso & 0xF_FFFF != 0 => meta.offload = large_send(head, length, lso)?,
        (_, Some(request)) if request & (TX_TCP | TX_UDP | TX_IP_HEADER) != 0 => {
            let transport = transport_of(head, request >> 16 & 0x3FF)?;
            if request & TX_IP_HEADER != 0 {
                fill = Some(transport);
            }
            if request & (TX_TCP | TX_UDP) != 0 {
                let wanted = if request & TX_TCP != 0 { TCP } else { UDP };
                if transport.protocol != wanted || !transport.fits(head.len()) {
                    return Err(Malformed);
                }
                meta.offload = Offload {
                    checksum: Checksum::Partial,
                    l4_offset: transport.l4_offset as u16,
                    ..Offload::default()
                };
            }
        }
        _ => {}
    }
    Ok((meta, fill))
}

fn transport_of(head: &[u8], header_offset: u32) -> Result<Transport, Malformed> {
    let transport = find_transport(head).ok_or(Malformed)?;
    if header_offset != 0 && header_offset as usize != transport.l4_offset {
        return Err(Malformed);
    }
    Ok(transport)
}

fn large_send(head: &[u8], length: usize, request: u32) -> Result<Offload, Malformed> {
    // Version 1 is never offered.
    if request & LSO_V2 == 0 {
        return Err(Malformed);
    }
    let transport = transport_of(head, request >> 20 & 0x3FF)?;
    let mss = request & 0xF_FFFF;
    if transport.protocol != TCP || !transport.fits(head.len()) {
        return Err(Malformed);
    }
    let header = usize::from(head.get(transport.l4_offset + 12).ok_or(Malformed)? >> 4) * 4;
    let payload = length
        .checked_sub(transport.l4_offset + header)
        .ok_or(Malformed)?;
    if header < 20 || payload > mss as usize * MAX_SEGMENTS {
        return Err(Malformed);
    }
    Ok(Offload {
        checksum: Checksum::Partial,
        l4_offset: transport.l4_offset as u16,
        mss,
        ..Offload::default()
    })
}

fn tci_from_info(value: u32) -> u16 {
    ((value & 7) << 13 | (value >> 3 & 1) << 12 | value >> 4 & 0xFFF) as u16
}

fn info_from_tci(tci: u16) -> u32 {
    let tci = u32::from(tci);
    tci >> 13 & 7 | (tci >> 12 & 1) << 3 | (tci & 0xFFF) << 4
}

/// Header and per-packet info of a message towards a guest; the frame's `length` bytes follow it directly.
#[derive(Clone, Copy)]
pub(crate) struct MessageHead {
    bytes: [u8; PACKET_HEADER_SIZE + MAX_RECORDS * RECORD],
    length: usize,
}

impl MessageHead {
    pub(crate) fn new(
        vlan: Option<u16>,
        checksum: u32,
        placed: Option<Placed>,
        packet_id: Option<u8>,
        length: usize,
    ) -> Self {
        let mut head = MessageHead {
            bytes: [0; PACKET_HEADER_SIZE + MAX_RECORDS * RECORD],
            length: PACKET_HEADER_SIZE,
        };
        if let Some(tci) = vlan {
            head.record(IEEE_8021Q_INFO, info_from_tci(tci));
        }
        if checksum != 0 {
            head.record(TCPIP_CHKSUM_PKTINFO, checksum);
        }
        if let Some(placed) = placed {
            head.record(NBL_HASH_VALUE, placed.value);
            head.record(NBL_HASH_INFO, placed.kind | TOEPLITZ);
        }
        if let Some(flags) = packet_id {
            // Version 1, flags, id 0.
            head.record(
                RNDIS_PKTINFO_INTERNAL | RNDIS_PKTINFO_ID,
                1 | u32::from(flags) << 8,
            );
        }
        let header = packet_header(head.length - PACKET_HEADER_SIZE, length);
        head.bytes[..PACKET_HEADER_SIZE].copy_from_slice(&header);
        head
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }

    fn record(&mut self, kind: u32, value: u32) {
        let words = [RECORD as u32, kind, PPI_HEADER_SIZE as u32, value];
        let target = self.bytes[self.length..].chunks_exact_mut(4);
        for (field, word) in target.zip(words) {
            field.copy_from_slice(&word.to_le_bytes());
        }
        self.length += RECORD;
    }
}

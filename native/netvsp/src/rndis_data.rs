//! RNDIS PACKET messages to frames and back (MS-RNDIS 2.2.14; per-packet info: ntddndis.h).
//!
//! All input is a private copy. Offsets inside a message are relative to its byte 8.

use vswitch_switch::endpoint::{Checksum, Meta, Offload, MAX_FRAME};

use crate::checksum::{find_transport, Transport, TCP, UDP};
use crate::limits::{ETHERNET_HEADER, MAX_RSC_RANGES};

pub(crate) const PACKET_HEADER: usize = 44;
const RNDIS_MSG_PACKET: u32 = 1;
const OFFSET_BASE: usize = 8;
const BODY_START: usize = PACKET_HEADER - OFFSET_BASE;
const INFO_HEADER: usize = 12;

const TCPIP_CHKSUM_PKTINFO: u32 = 0;
const TCP_LARGESEND_PKTINFO: u32 = 2;
const IEEE_8021Q_INFO: u32 = 6;
const NBL_HASH_VALUE: u32 = 8;
const PACKET_ID: u32 = 1 << 31 | 1;

const TX_TCP: u32 = 4;
const TX_UDP: u32 = 8;
const TX_IP_HEADER: u32 = 16;
const LSO_V2: u32 = 1 << 30;

/// A guest's message that breaks the format; the packet is answered with NVSP status 2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Malformed;

pub(crate) fn le32(data: &[u8], at: usize) -> Option<u32> {
    let bytes = data.get(at..at.checked_add(4)?)?;
    Some(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
}

/// One checked message of a packet: where its frame is, and what accompanies it.
#[derive(Debug)]
pub(crate) struct Parsed {
    pub(crate) message_length: usize,
    pub(crate) data_start: usize,
    pub(crate) data_length: usize,
    pub(crate) meta: Meta,
    /// The frame's IPv4 header checksum is to be filled in.
    pub(crate) fill_ip_checksum: Option<Transport>,
}

/// Values of the records that the data path acts upon; `Some(None)`: a record without its value.
#[derive(Default)]
struct Info {
    checksum: Option<Option<u32>>,
    lso: Option<Option<u32>>,
    vlan: Option<Option<u32>>,
    hash: Option<Option<u32>>,
}

/// Checks the message at the start of `data`.
pub(crate) fn parse(data: &[u8]) -> Result<Parsed, Malformed> {
    let field = |at| le32(data, at).ok_or(Malformed);
    if data.len() < PACKET_HEADER || field(0)? != RNDIS_MSG_PACKET {
        return Err(Malformed);
    }
    let length = field(4)? as usize;
    if length < PACKET_HEADER || length > data.len() {
        return Err(Malformed);
    }
    if field(16)? != 0 || field(20)? != 0 || field(24)? != 0 || field(36)? != 0 {
        return Err(Malformed);
    }
    let (data_offset, data_length) = (field(8)? as usize, field(12)? as usize);
    let (info_offset, info_length) = (field(28)? as usize, field(32)? as usize);
    if data_offset < BODY_START || OFFSET_BASE + data_offset + data_length > length {
        return Err(Malformed);
    }
    if !(ETHERNET_HEADER..=MAX_FRAME).contains(&data_length) {
        return Err(Malformed);
    }
    let message = data.get(..length).ok_or(Malformed)?;
    let mut info = Info::default();
    if info_length != 0 {
        if info_offset < BODY_START
            || !info_offset.is_multiple_of(4)
            || OFFSET_BASE + info_offset + info_length > length
            || PACKET_HEADER + info_length + data_length > length
        {
            return Err(Malformed);
        }
        let start = OFFSET_BASE + info_offset;
        info = parse_info(message.get(start..start + info_length).ok_or(Malformed)?)?;
    }
    let start = OFFSET_BASE + data_offset;
    let frame = message.get(start..start + data_length).ok_or(Malformed)?;
    let (meta, fill_ip_checksum) = apply(frame, &info)?;
    Ok(Parsed {
        message_length: length,
        data_start: start,
        data_length,
        meta,
        fill_ip_checksum,
    })
}

/// Per-packet info records; of two of one type the later counts. A record's data is at 12 whatever its offset says.
fn parse_info(mut area: &[u8]) -> Result<Info, Malformed> {
    let mut info = Info::default();
    while !area.is_empty() {
        let size = le32(area, 0).ok_or(Malformed)? as usize;
        let kind = le32(area, 4).ok_or(Malformed)?;
        if area.len() < INFO_HEADER || size < INFO_HEADER || !size.is_multiple_of(4) {
            return Err(Malformed);
        }
        let (record, rest) = area.split_at_checked(size).ok_or(Malformed)?;
        let value = Some(le32(record, INFO_HEADER));
        match kind {
            TCPIP_CHKSUM_PKTINFO => info.checksum = value,
            TCP_LARGESEND_PKTINFO => info.lso = value,
            IEEE_8021Q_INFO => info.vlan = value,
            NBL_HASH_VALUE => info.hash = value,
            _ => {}
        }
        area = rest;
    }
    Ok(info)
}

fn value(record: Option<Option<u32>>) -> Result<Option<u32>, Malformed> {
    match record {
        Some(None) => Err(Malformed),
        Some(value) => Ok(value),
        None => Ok(None),
    }
}

fn apply(frame: &[u8], info: &Info) -> Result<(Meta, Option<Transport>), Malformed> {
    let checksum = value(info.checksum)?;
    let lso = value(info.lso)?;
    let mut meta = Meta {
        offload: Offload::default(),
        vlan_tci: value(info.vlan)?.map(tci_from_info),
        hash: value(info.hash)?,
    };
    let mut fill = None;
    match (lso, checksum) {
        (Some(lso), _) if lso & 0xF_FFFF != 0 => meta.offload = large_send(frame, lso)?,
        (_, Some(request)) if request & (TX_TCP | TX_UDP | TX_IP_HEADER) != 0 => {
            let transport = transport_of(frame, request >> 16 & 0x3FF)?;
            if request & TX_IP_HEADER != 0 {
                fill = Some(transport);
            }
            if request & (TX_TCP | TX_UDP) != 0 {
                let wanted = if request & TX_TCP != 0 { TCP } else { UDP };
                if transport.protocol != wanted || !transport.fits(frame.len()) {
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

fn transport_of(frame: &[u8], header_offset: u32) -> Result<Transport, Malformed> {
    let transport = find_transport(frame).ok_or(Malformed)?;
    if header_offset != 0 && header_offset as usize != transport.l4_offset {
        return Err(Malformed);
    }
    Ok(transport)
}

fn large_send(frame: &[u8], request: u32) -> Result<Offload, Malformed> {
    // Version 1 is never offered.
    if request & LSO_V2 == 0 {
        return Err(Malformed);
    }
    let transport = transport_of(frame, request >> 20 & 0x3FF)?;
    let mss = request & 0xF_FFFF;
    if transport.protocol != TCP || !transport.fits(frame.len()) {
        return Err(Malformed);
    }
    let header = usize::from(frame.get(transport.l4_offset + 12).ok_or(Malformed)? >> 4) * 4;
    let payload = frame
        .len()
        .checked_sub(transport.l4_offset + header)
        .ok_or(Malformed)?;
    if header < 20 || payload > mss as usize * MAX_RSC_RANGES {
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
    bytes: [u8; PACKET_HEADER + 3 * 16],
    length: usize,
}

impl MessageHead {
    pub(crate) fn new(
        vlan: Option<u16>,
        checksum: u32,
        packet_id: Option<u8>,
        length: usize,
    ) -> Self {
        let mut head = MessageHead {
            bytes: [0; PACKET_HEADER + 3 * 16],
            length: PACKET_HEADER,
        };
        if let Some(tci) = vlan {
            head.record(IEEE_8021Q_INFO, info_from_tci(tci));
        }
        if checksum != 0 {
            head.record(TCPIP_CHKSUM_PKTINFO, checksum);
        }
        if let Some(flags) = packet_id {
            head.record(PACKET_ID, 1 | u32::from(flags) << 8);
        }
        let info = (head.length - PACKET_HEADER) as u32;
        let body = BODY_START as u32;
        head.put(0, RNDIS_MSG_PACKET);
        head.put(4, (head.length + length) as u32);
        head.put(8, body + info);
        head.put(12, length as u32);
        head.put(28, if info == 0 { 0 } else { body });
        head.put(32, info);
        head
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }

    fn put(&mut self, at: usize, value: u32) {
        self.bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }

    fn record(&mut self, kind: u32, value: u32) {
        let at = self.length;
        self.put(at, 16);
        self.put(at + 4, kind);
        self.put(at + 8, INFO_HEADER as u32);
        self.put(at + 12, value);
        self.length += 16;
    }
}

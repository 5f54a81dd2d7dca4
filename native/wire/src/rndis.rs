//! RNDIS: control messages, the PACKET message and its per-packet info (MS-RNDIS, Linux include/linux/rndis.h).
//!
//! `u32 type, u32 message length` (these 8 bytes included), then the body. Offsets inside a message count from byte 8.

use crate::bytes::{Bytes, Put};
use crate::error::{bad, Result, WireError};
use crate::record::{record, Shown, Value};

pub const RNDIS_MSG_PACKET: u32 = 0x0000_0001;
pub const RNDIS_MSG_INIT: u32 = 0x0000_0002;
pub const RNDIS_MSG_INIT_C: u32 = 0x8000_0002;
pub const RNDIS_MSG_HALT: u32 = 0x0000_0003;
pub const RNDIS_MSG_QUERY: u32 = 0x0000_0004;
pub const RNDIS_MSG_QUERY_C: u32 = 0x8000_0004;
pub const RNDIS_MSG_SET: u32 = 0x0000_0005;
pub const RNDIS_MSG_SET_C: u32 = 0x8000_0005;
pub const RNDIS_MSG_RESET: u32 = 0x0000_0006;
pub const RNDIS_MSG_RESET_C: u32 = 0x8000_0006;
pub const RNDIS_MSG_INDICATE: u32 = 0x0000_0007;
pub const RNDIS_MSG_KEEPALIVE: u32 = 0x0000_0008;
pub const RNDIS_MSG_KEEPALIVE_C: u32 = 0x8000_0008;

pub const HEADER_SIZE: usize = 8;
pub const PACKET_HEADER_SIZE: usize = 44;
pub const PACKET_BODY_SIZE: usize = 36;
pub const PPI_HEADER_SIZE: usize = 12;

pub const TCPIP_CHKSUM_PKTINFO: u32 = 0;
pub const TCP_LARGESEND_PKTINFO: u32 = 2;
pub const IEEE_8021Q_INFO: u32 = 6;
pub const NBL_HASH_VALUE: u32 = 8;
pub const NBL_HASH_INFO: u32 = 9;
pub const RNDIS_PKTINFO_INTERNAL: u32 = 0x8000_0000;
pub const RNDIS_PKTINFO_ID: u32 = 1;

record!(Initialize [24] {
    request_id: u32 => 8, major_version: u32 => 12, minor_version: u32 => 16, max_transfer_size: u32 => 20,
});
record!(InitializeComplete [52] {
    request_id: u32 => 8, status: u32 => 12, major_version: u32 => 16, minor_version: u32 => 20,
    device_flags: u32 => 24, medium: u32 => 28, max_packets_per_message: u32 => 32, max_transfer_size: u32 => 36,
    packet_alignment_factor: u32 => 40, af_list_offset: u32 => 44, af_list_size: u32 => 48,
});
record!(Halt [12] { request_id: u32 => 8 });
record!(SetComplete [16] { request_id: u32 => 8, status: u32 => 12 });
record!(Reset [12] { reserved: u32 => 8 });
record!(ResetComplete [16] { status: u32 => 8, addressing_reset: u32 => 12 });
record!(KeepAlive [12] { request_id: u32 => 8 });
record!(KeepAliveComplete [16] { request_id: u32 => 8, status: u32 => 12 });

/// QUERY and SET: request id, OID, buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OidRequest<'a> {
    pub request_id: u32,
    pub oid: u32,
    pub info: &'a [u8],
}

/// An information buffer; without bytes any offset will do.
fn buffer<'a>(
    what: &'static str,
    bytes: &Bytes<'a>,
    offset: u32,
    length: u32,
    fixed: usize,
) -> Result<&'a [u8]> {
    if length == 0 {
        return Ok(&[]);
    }
    let start = HEADER_SIZE + offset as usize;
    if start < fixed {
        return bad(what, "its buffer lies in the header");
    }
    bytes.slice(start, length as usize)
}

impl<'a> OidRequest<'a> {
    const SIZE: usize = 28;

    fn parse(what: &'static str, data: &'a [u8]) -> Result<Self> {
        let bytes = Bytes::new(what, data, Self::SIZE)?;
        let info = buffer(what, &bytes, bytes.u32(20)?, bytes.u32(16)?, Self::SIZE)?;
        Ok(Self {
            request_id: bytes.u32(8)?,
            oid: bytes.u32(12)?,
            info,
        })
    }

    fn put(&self, out: &mut Vec<u8>) {
        out.put_u32(self.request_id);
        out.put_u32(self.oid);
        out.put_u32(self.info.len() as u32);
        out.put_u32((Self::SIZE - HEADER_SIZE) as u32);
        out.put_u32(0);
        out.extend_from_slice(self.info);
    }

    fn fields(&self) -> Vec<(&'static str, Value)> {
        vec![
            ("request_id", Value::Int(u64::from(self.request_id))),
            ("oid", Value::Int(u64::from(self.oid))),
            ("info", Value::Bytes(self.info.to_vec())),
        ]
    }
}

/// Where the parts of a PACKET message are, in bytes from its start, all checked against its length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PacketHeader {
    pub message_length: usize,
    pub data_start: usize,
    pub data_length: usize,
    pub ppi_start: usize,
    pub ppi_length: usize,
}

impl PacketHeader {
    /// Checks the 44-byte header of a message of which `available` bytes are there.
    ///
    /// Refuses an empty frame, parts outside the message or inside the header, frame and per-packet info that do not fit
    /// together, out-of-band data and VC handles.
    pub fn parse(header: &[u8], available: usize) -> Result<Self> {
        const WHAT: &str = "RNDIS PACKET";
        let bytes = Bytes::new(WHAT, header, PACKET_HEADER_SIZE)?;
        if bytes.u32(0)? != RNDIS_MSG_PACKET {
            return bad(WHAT, "another message type");
        }
        let length = bytes.u32(4)? as usize;
        if length < PACKET_HEADER_SIZE || length > available {
            return bad(
                WHAT,
                "its length is below 44 or beyond the bytes that are there",
            );
        }
        if bytes.u32(16)? != 0 || bytes.u32(20)? != 0 || bytes.u32(24)? != 0 || bytes.u32(36)? != 0
        {
            return bad(WHAT, "out-of-band data or a VC handle, expected none");
        }
        let (data_offset, data_length) = (bytes.u32(8)? as usize, bytes.u32(12)? as usize);
        if data_length == 0 {
            return bad(WHAT, "the frame is empty");
        }
        if data_offset < PACKET_BODY_SIZE || HEADER_SIZE + data_offset + data_length > length {
            return bad(WHAT, "the frame does not fit in the message");
        }
        let (mut ppi_offset, ppi_length) = (bytes.u32(28)? as usize, bytes.u32(32)? as usize);
        if ppi_length == 0 {
            ppi_offset = PACKET_BODY_SIZE;
        } else if ppi_offset < PACKET_BODY_SIZE
            || !ppi_offset.is_multiple_of(4)
            || HEADER_SIZE + ppi_offset + ppi_length > length
            || PACKET_HEADER_SIZE + ppi_length + data_length > length
        {
            return bad(WHAT, "the per-packet info does not fit in the message");
        }
        Ok(Self {
            message_length: length,
            data_start: HEADER_SIZE + data_offset,
            data_length,
            ppi_start: HEADER_SIZE + ppi_offset,
            ppi_length,
        })
    }
}

/// One per-packet-info record; bit 31 of `kind` is the internal namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PerPacketInfo<'a> {
    pub kind: u32,
    pub data: &'a [u8],
}

impl PerPacketInfo<'_> {
    /// The record's first u32, if it has one.
    pub fn value(&self) -> Option<u32> {
        self.data
            .first_chunk::<4>()
            .map(|bytes| u32::from_le_bytes(*bytes))
    }
}

/// Walks a per-packet info area. A record's data is at 12 whatever its offset field says. An error ends the walk.
#[derive(Clone, Debug)]
pub struct PpiIter<'a> {
    data: &'a [u8],
}

impl<'a> PpiIter<'a> {
    pub fn new(data: &'a [u8]) -> Self {
        Self { data }
    }

    fn step(&mut self) -> Result<PerPacketInfo<'a>> {
        const WHAT: &str = "per-packet info";
        let bytes = Bytes::new(WHAT, self.data, PPI_HEADER_SIZE)?;
        let (size, kind) = (bytes.u32(0)? as usize, bytes.u32(4)?);
        if size < PPI_HEADER_SIZE || !size.is_multiple_of(4) || size > self.data.len() {
            return bad(WHAT, "a record's size is wrong");
        }
        let data = bytes.slice(PPI_HEADER_SIZE, size - PPI_HEADER_SIZE)?;
        self.data = self.data.get(size..).unwrap_or_default();
        Ok(PerPacketInfo { kind, data })
    }
}

impl<'a> Iterator for PpiIter<'a> {
    type Item = Result<PerPacketInfo<'a>>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.data.is_empty() {
            return None;
        }
        let step = self.step();
        if step.is_err() {
            self.data = &[];
        }
        Some(step)
    }
}

/// Appends a record whose data is one u32.
pub fn put_ppi(out: &mut Vec<u8>, kind: u32, value: u32) {
    out.put_u32((PPI_HEADER_SIZE + 4) as u32);
    out.put_u32(kind);
    out.put_u32(PPI_HEADER_SIZE as u32);
    out.put_u32(value);
}

/// The 44-byte header of a PACKET message with `ppi_length` bytes of per-packet info, then `data_length` of frame.
pub fn packet_header(ppi_length: usize, data_length: usize) -> [u8; PACKET_HEADER_SIZE] {
    let mut header = [0u8; PACKET_HEADER_SIZE];
    let mut put = |at: usize, value: usize| {
        if let Some(word) = header.get_mut(at..at + 4) {
            word.copy_from_slice(&(value as u32).to_le_bytes());
        }
    };
    put(0, RNDIS_MSG_PACKET as usize);
    put(4, PACKET_HEADER_SIZE + ppi_length + data_length);
    put(8, PACKET_BODY_SIZE + ppi_length);
    put(12, data_length);
    put(28, if ppi_length == 0 { 0 } else { PACKET_BODY_SIZE });
    put(32, ppi_length);
    header
}

/// Type and length of the message at the start of `data`.
pub fn message_header(data: &[u8]) -> Result<(u32, usize)> {
    const WHAT: &str = "RNDIS message";
    let bytes = Bytes::new(WHAT, data, HEADER_SIZE)?;
    let length = bytes.u32(4)? as usize;
    if length < HEADER_SIZE || length > data.len() {
        return bad(
            WHAT,
            "its length is below 8 or beyond the bytes that are there",
        );
    }
    Ok((bytes.u32(0)?, length))
}

/// A message; buffers and frames are borrowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RndisMessage<'a> {
    Packet {
        ppi: &'a [u8],
        data: &'a [u8],
    },
    Initialize(Initialize),
    InitializeComplete(InitializeComplete),
    Halt(Halt),
    Query(OidRequest<'a>),
    QueryComplete {
        request_id: u32,
        status: u32,
        info: &'a [u8],
    },
    Set(OidRequest<'a>),
    SetComplete(SetComplete),
    Reset(Reset),
    ResetComplete(ResetComplete),
    IndicateStatus {
        status: u32,
        buffer: &'a [u8],
    },
    KeepAlive(KeepAlive),
    KeepAliveComplete(KeepAliveComplete),
}

impl<'a> RndisMessage<'a> {
    /// Decodes the first message in `data`; bytes beyond its length are ignored.
    pub fn parse(data: &'a [u8]) -> Result<Self> {
        let (number, length) = message_header(data)?;
        let data = data.get(..length).unwrap_or_default();
        match number {
            RNDIS_MSG_PACKET => {
                let header = PacketHeader::parse(data, length)?;
                let bytes = Bytes::new("RNDIS PACKET", data, PACKET_HEADER_SIZE)?;
                let ppi = bytes.slice(header.ppi_start, header.ppi_length)?;
                PpiIter::new(ppi).try_for_each(|record| record.map(|_| ()))?;
                Ok(Self::Packet {
                    ppi,
                    data: bytes.slice(header.data_start, header.data_length)?,
                })
            }
            RNDIS_MSG_INIT => Initialize::parse(data).map(Self::Initialize),
            RNDIS_MSG_INIT_C => InitializeComplete::parse(data).map(Self::InitializeComplete),
            RNDIS_MSG_HALT => Halt::parse(data).map(Self::Halt),
            RNDIS_MSG_QUERY => OidRequest::parse("Query", data).map(Self::Query),
            RNDIS_MSG_QUERY_C => {
                let bytes = Bytes::new("QueryComplete", data, 24)?;
                let info = buffer("QueryComplete", &bytes, bytes.u32(20)?, bytes.u32(16)?, 24)?;
                Ok(Self::QueryComplete {
                    request_id: bytes.u32(8)?,
                    status: bytes.u32(12)?,
                    info,
                })
            }
            RNDIS_MSG_SET => OidRequest::parse("Set", data).map(Self::Set),
            RNDIS_MSG_SET_C => SetComplete::parse(data).map(Self::SetComplete),
            RNDIS_MSG_RESET => Reset::parse(data).map(Self::Reset),
            RNDIS_MSG_RESET_C => ResetComplete::parse(data).map(Self::ResetComplete),
            RNDIS_MSG_INDICATE => {
                let bytes = Bytes::new("IndicateStatus", data, 20)?;
                let buffer = buffer("IndicateStatus", &bytes, bytes.u32(16)?, bytes.u32(12)?, 20)?;
                Ok(Self::IndicateStatus {
                    status: bytes.u32(8)?,
                    buffer,
                })
            }
            RNDIS_MSG_KEEPALIVE => KeepAlive::parse(data).map(Self::KeepAlive),
            RNDIS_MSG_KEEPALIVE_C => KeepAliveComplete::parse(data).map(Self::KeepAliveComplete),
            number => Err(WireError::Unknown {
                protocol: "RNDIS",
                number,
            }),
        }
    }

    /// The type number.
    pub fn number(&self) -> u32 {
        match self {
            Self::Packet { .. } => RNDIS_MSG_PACKET,
            Self::Initialize(_) => RNDIS_MSG_INIT,
            Self::InitializeComplete(_) => RNDIS_MSG_INIT_C,
            Self::Halt(_) => RNDIS_MSG_HALT,
            Self::Query(_) => RNDIS_MSG_QUERY,
            Self::QueryComplete { .. } => RNDIS_MSG_QUERY_C,
            Self::Set(_) => RNDIS_MSG_SET,
            Self::SetComplete(_) => RNDIS_MSG_SET_C,
            Self::Reset(_) => RNDIS_MSG_RESET,
            Self::ResetComplete(_) => RNDIS_MSG_RESET_C,
            Self::IndicateStatus { .. } => RNDIS_MSG_INDICATE,
            Self::KeepAlive(_) => RNDIS_MSG_KEEPALIVE,
            Self::KeepAliveComplete(_) => RNDIS_MSG_KEEPALIVE_C,
        }
    }

    /// The message's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        if let Self::Packet { ppi, data } = self {
            out.extend_from_slice(&packet_header(ppi.len(), data.len()));
            out.extend_from_slice(ppi);
            out.extend_from_slice(data);
            return out;
        }
        out.put_u32(self.number());
        out.put_u32(0);
        match self {
            Self::Packet { .. } => {}
            Self::Initialize(message) => message.put(&mut out, 0),
            Self::InitializeComplete(message) => message.put(&mut out, 0),
            Self::Halt(message) => message.put(&mut out, 0),
            Self::Query(message) | Self::Set(message) => message.put(&mut out),
            Self::QueryComplete {
                request_id,
                status,
                info,
            } => {
                out.put_u32(*request_id);
                out.put_u32(*status);
                out.put_u32(info.len() as u32);
                out.put_u32(16);
                out.extend_from_slice(info);
            }
            Self::SetComplete(message) => message.put(&mut out, 0),
            Self::Reset(message) => message.put(&mut out, 0),
            Self::ResetComplete(message) => message.put(&mut out, 0),
            Self::IndicateStatus { status, buffer } => {
                out.put_u32(*status);
                out.put_u32(buffer.len() as u32);
                out.put_u32(if buffer.is_empty() { 0 } else { 12 });
                out.extend_from_slice(buffer);
            }
            Self::KeepAlive(message) => message.put(&mut out, 0),
            Self::KeepAliveComplete(message) => message.put(&mut out, 0),
        }
        let length = (out.len() as u32).to_le_bytes();
        if let Some(field) = out.get_mut(4..8) {
            field.copy_from_slice(&length);
        }
        out
    }

    /// Name and fields, as the Python twin has them.
    pub fn show(&self) -> Shown {
        let int = |value: u32| Value::Int(u64::from(value));
        match self {
            Self::Packet { ppi, data } => {
                let records = PpiIter::new(ppi)
                    .flatten()
                    .map(|record| {
                        Value::Record(vec![
                            ("type", int(record.kind)),
                            ("data", Value::Bytes(record.data.to_vec())),
                        ])
                    })
                    .collect();
                (
                    "Packet",
                    vec![
                        ("data", Value::Bytes(data.to_vec())),
                        ("ppi", Value::List(records)),
                    ],
                )
            }
            Self::Initialize(message) => message.show(),
            Self::InitializeComplete(message) => message.show(),
            Self::Halt(message) => message.show(),
            Self::Query(message) => ("Query", message.fields()),
            Self::QueryComplete {
                request_id,
                status,
                info,
            } => (
                "QueryComplete",
                vec![
                    ("request_id", int(*request_id)),
                    ("status", int(*status)),
                    ("info", Value::Bytes(info.to_vec())),
                ],
            ),
            Self::Set(message) => ("Set", message.fields()),
            Self::SetComplete(message) => message.show(),
            Self::Reset(message) => message.show(),
            Self::ResetComplete(message) => message.show(),
            Self::IndicateStatus { status, buffer } => (
                "IndicateStatus",
                vec![
                    ("status", int(*status)),
                    ("buffer", Value::Bytes(buffer.to_vec())),
                ],
            ),
            Self::KeepAlive(message) => message.show(),
            Self::KeepAliveComplete(message) => message.show(),
        }
    }
}

/// Walks the messages of an aggregate: each one's length leads to the next, and only PACKET may follow the first.
/// An error ends the walk.
#[derive(Clone, Debug)]
pub struct Aggregate<'a> {
    data: &'a [u8],
    first: bool,
}

impl<'a> Aggregate<'a> {
    pub fn new(data: &'a [u8]) -> Self {
        Self { data, first: true }
    }
}

impl<'a> Iterator for Aggregate<'a> {
    type Item = Result<&'a [u8]>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.data.is_empty() {
            return None;
        }
        let step = message_header(self.data).and_then(|(number, length)| {
            if !self.first && number != RNDIS_MSG_PACKET {
                return bad(
                    "RNDIS aggregate",
                    "only PACKET may follow the first message",
                );
            }
            Ok(self
                .data
                .split_at_checked(length)
                .unwrap_or((self.data, &[])))
        });
        self.first = false;
        match step {
            Ok((message, rest)) => {
                self.data = rest;
                Some(Ok(message))
            }
            Err(error) => {
                self.data = &[];
                Some(Err(error))
            }
        }
    }
}

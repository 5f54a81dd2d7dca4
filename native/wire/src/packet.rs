//! VMBus ring packets (Linux include/linux/hyperv.h, struct vmpacket_descriptor).
//!
//! `u16 type, u16 data offset / 8, u16 length / 8, u16 flags, u64 transaction id`, the type's own header, payload,
//! padding to 8. The 8-byte trailer belongs to the ring.

use crate::bytes::{Bytes, Put};
use crate::error::{bad, Result, WireError};
use crate::gpadl::{RangeIter, MAXIMUM_PFN};

pub const VM_PKT_DATA_INBAND: u16 = 0x6;
pub const VM_PKT_DATA_USING_XFER_PAGES: u16 = 0x7;
pub const VM_PKT_DATA_USING_GPA_DIRECT: u16 = 0x9;
pub const VM_PKT_COMP: u16 = 0xB;
pub const VMBUS_DATA_PACKET_FLAG_COMPLETION_REQUESTED: u16 = 1;

pub const DESCRIPTOR_SIZE: usize = 16;
pub const RANGES_OFFSET: usize = 24;
pub const TRAILER_SIZE: usize = 8;
pub const MAXIMUM_PACKET_SIZE: usize = 0xFFFF * 8;

/// The fixed part of a packet, with its lengths in bytes and checked against each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    pub kind: u16,
    pub data_offset: usize,
    pub length: usize,
    pub flags: u16,
    pub transaction_id: u64,
}

impl Descriptor {
    /// Decodes 16 bytes; the data offset lies within 16..=length.
    pub fn parse(data: &[u8]) -> Result<Self> {
        const WHAT: &str = "VMBus packet";
        let bytes = Bytes::new(WHAT, data, DESCRIPTOR_SIZE)?;
        let descriptor = Descriptor {
            kind: bytes.u16(0)?,
            data_offset: usize::from(bytes.u16(2)?) * 8,
            length: usize::from(bytes.u16(4)?) * 8,
            flags: bytes.u16(6)?,
            transaction_id: bytes.u64(8)?,
        };
        if descriptor.data_offset < DESCRIPTOR_SIZE || descriptor.data_offset > descriptor.length {
            return bad(WHAT, "data offset outside the packet");
        }
        Ok(descriptor)
    }

    pub fn completion_requested(&self) -> bool {
        self.flags & VMBUS_DATA_PACKET_FLAG_COMPLETION_REQUESTED != 0
    }
}

/// A packet over private bytes: descriptor, the type's own header, payload.
#[derive(Clone, Copy, Debug)]
pub struct PacketRef<'a> {
    pub descriptor: Descriptor,
    /// Bytes 16..data offset.
    pub header: &'a [u8],
    /// The payload, rounded up to 8 bytes by the sender: message lengths come from inner headers.
    pub payload: &'a [u8],
}

/// One range of a transfer page set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TransferRange {
    pub byte_count: u32,
    pub byte_offset: u32,
}

impl<'a> PacketRef<'a> {
    /// `data` is exactly one packet without its trailer.
    pub fn parse(data: &'a [u8]) -> Result<Self> {
        let descriptor = Descriptor::parse(data)?;
        if descriptor.length != data.len() {
            return bad(
                "VMBus packet",
                "its length field differs from the bytes that are there",
            );
        }
        Ok(Self::from_checked(descriptor, data))
    }

    /// `descriptor` was parsed from `data`, whose length it gives.
    fn from_checked(descriptor: Descriptor, data: &'a [u8]) -> Self {
        let header = data
            .get(DESCRIPTOR_SIZE..descriptor.data_offset)
            .unwrap_or_default();
        let payload = data
            .get(descriptor.data_offset..descriptor.length)
            .unwrap_or_default();
        Self {
            descriptor,
            header,
            payload,
        }
    }

    pub fn kind(&self) -> u16 {
        self.descriptor.kind
    }

    pub fn transaction_id(&self) -> u64 {
        self.descriptor.transaction_id
    }

    pub fn completion_requested(&self) -> bool {
        self.descriptor.completion_requested()
    }

    /// Set id and ranges of a transfer-page packet (type 7).
    pub fn transfer_ranges(
        &self,
    ) -> Result<(u16, impl ExactSizeIterator<Item = TransferRange> + 'a)> {
        const WHAT: &str = "transfer-page packet";
        let bytes = Bytes::new(WHAT, self.header, RANGES_OFFSET - DESCRIPTOR_SIZE)?;
        let set_id = bytes.u16(0)?;
        let count = bytes.u32(4)? as usize;
        let ranges = bytes.slice(8, self.header.len() - 8)?;
        if count == 0 || count > ranges.len() / 8 {
            return bad(WHAT, "its ranges do not fit before its data");
        }
        Ok((
            set_id,
            ranges
                .chunks_exact(8)
                .take(count)
                .map(|entry| TransferRange {
                    byte_count: u32::from_le_bytes([entry[0], entry[1], entry[2], entry[3]]),
                    byte_offset: u32::from_le_bytes([entry[4], entry[5], entry[6], entry[7]]),
                }),
        ))
    }

    /// The ranges of a GPA-direct packet (type 9). Each step checks one range; the first error ends the iteration.
    pub fn gpa_ranges(&self) -> Result<RangeIter<'a>> {
        const WHAT: &str = "GPA-direct packet";
        let bytes = Bytes::new(WHAT, self.header, RANGES_OFFSET - DESCRIPTOR_SIZE)?;
        let count = bytes.u32(4)?;
        RangeIter::new(WHAT, bytes.slice(8, self.header.len() - 8)?, count)
    }

    /// Checks everything that `decode` of the Python twin checks: kind and ranges.
    pub fn validate(&self) -> Result<()> {
        match self.kind() {
            VM_PKT_DATA_INBAND | VM_PKT_COMP => Ok(()),
            VM_PKT_DATA_USING_XFER_PAGES => self.transfer_ranges().map(|_| ()),
            VM_PKT_DATA_USING_GPA_DIRECT => {
                self.gpa_ranges()?.try_for_each(|range| range.map(|_| ()))
            }
            other => Err(WireError::Unknown {
                protocol: "VMBus packet",
                number: u32::from(other),
            }),
        }
    }
}

fn start(
    out: &mut Vec<u8>,
    kind: u16,
    header: usize,
    payload: usize,
    transaction_id: u64,
    completion: bool,
) -> Result<()> {
    let offset = DESCRIPTOR_SIZE + header;
    let length = offset + payload.next_multiple_of(8);
    let (Ok(offset8), Ok(length8)) = (u16::try_from(offset / 8), u16::try_from(length / 8)) else {
        return bad("VMBus packet", "longer than 524280 bytes");
    };
    out.clear();
    out.put_u16(kind);
    out.put_u16(offset8);
    out.put_u16(length8);
    out.put_u16(if completion {
        VMBUS_DATA_PACKET_FLAG_COMPLETION_REQUESTED
    } else {
        0
    });
    out.put_u64(transaction_id);
    Ok(())
}

fn finish(out: &mut Vec<u8>, payload: &[u8]) {
    out.extend_from_slice(payload);
    out.put_zeros(payload.len().next_multiple_of(8) - payload.len());
}

/// Makes an in-band packet (type 6) in `out`, which is cleared first.
pub fn encode_inband(
    out: &mut Vec<u8>,
    payload: &[u8],
    transaction_id: u64,
    completion: bool,
) -> Result<()> {
    start(
        out,
        VM_PKT_DATA_INBAND,
        0,
        payload.len(),
        transaction_id,
        completion,
    )?;
    finish(out, payload);
    Ok(())
}

/// Makes a completion (type 0xB) in `out`.
pub fn encode_completion(out: &mut Vec<u8>, transaction_id: u64, payload: &[u8]) -> Result<()> {
    start(out, VM_PKT_COMP, 0, payload.len(), transaction_id, false)?;
    finish(out, payload);
    Ok(())
}

/// Makes a transfer-page packet (type 7) in `out`.
pub fn encode_transfer_pages(
    out: &mut Vec<u8>,
    transaction_id: u64,
    set_id: u16,
    ranges: &[TransferRange],
    payload: &[u8],
    completion: bool,
) -> Result<()> {
    let Ok(count) = u32::try_from(ranges.len()) else {
        return bad("transfer-page packet", "too many ranges");
    };
    start(
        out,
        VM_PKT_DATA_USING_XFER_PAGES,
        8 + ranges.len() * 8,
        payload.len(),
        transaction_id,
        completion,
    )?;
    out.put_u16(set_id);
    out.put_u16(0);
    out.put_u32(count);
    for range in ranges {
        out.put_u32(range.byte_count);
        out.put_u32(range.byte_offset);
    }
    finish(out, payload);
    Ok(())
}

/// One range of a GPA-direct packet to be made: `byte_count` bytes, `byte_offset` into the first of `pfns`.
#[derive(Clone, Copy, Debug)]
pub struct GpaRangeRef<'a> {
    pub byte_count: u32,
    pub byte_offset: u32,
    pub pfns: &'a [u64],
}

/// Makes a GPA-direct packet (type 9) in `out`.
pub fn encode_gpa_direct(
    out: &mut Vec<u8>,
    transaction_id: u64,
    ranges: &[GpaRangeRef<'_>],
    payload: &[u8],
    completion: bool,
) -> Result<()> {
    const WHAT: &str = "GPA-direct packet";
    let Ok(count) = u32::try_from(ranges.len()) else {
        return bad(WHAT, "too many ranges");
    };
    let header = 8 + ranges
        .iter()
        .map(|range| 8 + range.pfns.len() * 8)
        .sum::<usize>();
    start(
        out,
        VM_PKT_DATA_USING_GPA_DIRECT,
        header,
        payload.len(),
        transaction_id,
        completion,
    )?;
    out.put_u32(0);
    out.put_u32(count);
    for range in ranges {
        if range.pfns.iter().any(|pfn| *pfn > MAXIMUM_PFN) {
            return bad(WHAT, "a page number beyond 52 bits");
        }
        out.put_u32(range.byte_count);
        out.put_u32(range.byte_offset);
        for pfn in range.pfns {
            out.put_u64(*pfn);
        }
    }
    finish(out, payload);
    Ok(())
}

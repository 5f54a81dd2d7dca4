//! The hypercall ABI: control and result words, statuses, inputs (TLFS, Hypercall Interface; openvmm hvdef).

use crate::bytes::{Bytes, Put};
use crate::error::{bad, Result};

pub const HVCALL_GET_PARTITION_ID: u16 = 0x46;
pub const HVCALL_POST_MESSAGE: u16 = 0x5C;
pub const HVCALL_SIGNAL_EVENT: u16 = 0x5D;

pub const HV_STATUS_SUCCESS: u16 = 0x0;
pub const HV_STATUS_INVALID_HYPERCALL_CODE: u16 = 0x2;
pub const HV_STATUS_INVALID_HYPERCALL_INPUT: u16 = 0x3;
pub const HV_STATUS_INVALID_ALIGNMENT: u16 = 0x4;
pub const HV_STATUS_INVALID_PARAMETER: u16 = 0x5;
pub const HV_STATUS_ACCESS_DENIED: u16 = 0x6;
pub const HV_STATUS_INVALID_PORT_ID: u16 = 0x11;
pub const HV_STATUS_INVALID_CONNECTION_ID: u16 = 0x12;
pub const HV_STATUS_INSUFFICIENT_BUFFERS: u16 = 0x13;

pub const HV_MESSAGE_PAYLOAD_BYTE_COUNT: usize = 240;
pub const CONNECTION_ID_MASK: u32 = 0xFF_FFFF;
const RESERVED: u64 = 0b1111 << 27 | 0b1111 << 44 | 0b1111 << 60;

/// The hypercall input value (RCX). `variable_header` counts 8-byte units.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ControlWord {
    pub call_code: u16,
    pub fast: bool,
    pub variable_header: u16,
    pub nested: bool,
    pub rep_count: u16,
    pub rep_start: u16,
}

impl ControlWord {
    /// Decodes the u64; reserved bits are an error (INVALID_HYPERCALL_INPUT).
    pub fn parse(value: u64) -> Result<Self> {
        if value & RESERVED != 0 {
            return bad("hypercall control word", "reserved bits are set");
        }
        Ok(Self {
            call_code: value as u16,
            fast: value >> 16 & 1 != 0,
            variable_header: (value >> 17 & 0x3FF) as u16,
            nested: value >> 31 & 1 != 0,
            rep_count: (value >> 32 & 0xFFF) as u16,
            rep_start: (value >> 48 & 0xFFF) as u16,
        })
    }

    pub fn encode(&self) -> u64 {
        u64::from(self.call_code)
            | u64::from(self.fast) << 16
            | u64::from(self.variable_header) << 17
            | u64::from(self.nested) << 31
            | u64::from(self.rep_count) << 32
            | u64::from(self.rep_start) << 48
    }
}

/// HvCallPostMessage: 256 bytes, never fast.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PostMessage<'a> {
    pub connection_id: u32,
    pub message_type: u32,
    pub payload: &'a [u8],
}

impl<'a> PostMessage<'a> {
    pub const SIZE: usize = 256;

    /// Decodes the input block; refuses message type 0 or with bit 31, and payloads above 240 bytes.
    pub fn parse(data: &'a [u8]) -> Result<Self> {
        const WHAT: &str = "PostMessage";
        let bytes = Bytes::new(WHAT, data, Self::SIZE)?;
        let (message_type, size) = (bytes.u32(8)?, bytes.u32(12)? as usize);
        if message_type == 0 || message_type >> 31 != 0 {
            return bad(WHAT, "message type 0 or with bit 31 set");
        }
        if size > HV_MESSAGE_PAYLOAD_BYTE_COUNT {
            return bad(WHAT, "payload above 240 bytes");
        }
        Ok(Self {
            connection_id: bytes.u32(0)?,
            message_type,
            payload: bytes.slice(16, size)?,
        })
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(Self::SIZE);
        out.put_u32(self.connection_id);
        out.put_u32(0);
        out.put_u32(self.message_type);
        out.put_u32(self.payload.len() as u32);
        out.extend_from_slice(self.payload);
        out.resize(Self::SIZE, 0);
        out
    }
}

/// HvCallSignalEvent, from its 8 bytes of input as one word: connection id, flag, reserved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SignalEvent {
    pub connection_id: u32,
    pub flag: u16,
    pub reserved: u16,
}

impl SignalEvent {
    pub fn parse(value: u64) -> Self {
        Self {
            connection_id: value as u32,
            flag: (value >> 32) as u16,
            reserved: (value >> 48) as u16,
        }
    }
}

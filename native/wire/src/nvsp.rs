//! NVSP, the protocol between NetVSC and NetVSP (openvmm netvsp/src/protocol.rs, Linux hyperv_net.h).
//!
//! Every message starts with `u32 type`. Any length that holds the type's own fields is accepted.

use crate::bytes::{Bytes, Put};
use crate::error::{bad, Result, WireError};
use crate::record::{record, Shown, Value};

pub const NVSP_MSG_TYPE_INIT: u32 = 1;
pub const NVSP_MSG_TYPE_INIT_COMPLETE: u32 = 2;
pub const NVSP_MSG1_TYPE_SEND_NDIS_VER: u32 = 100;
pub const NVSP_MSG1_TYPE_SEND_RECV_BUF: u32 = 101;
pub const NVSP_MSG1_TYPE_SEND_RECV_BUF_COMPLETE: u32 = 102;
pub const NVSP_MSG1_TYPE_REVOKE_RECV_BUF: u32 = 103;
pub const NVSP_MSG1_TYPE_SEND_SEND_BUF: u32 = 104;
pub const NVSP_MSG1_TYPE_SEND_SEND_BUF_COMPLETE: u32 = 105;
pub const NVSP_MSG1_TYPE_REVOKE_SEND_BUF: u32 = 106;
pub const NVSP_MSG1_TYPE_SEND_RNDIS_PKT: u32 = 107;
pub const NVSP_MSG1_TYPE_SEND_RNDIS_PKT_COMPLETE: u32 = 108;
pub const NVSP_MSG2_TYPE_SEND_NDIS_CONFIG: u32 = 125;
pub const NVSP_MSG4_TYPE_SEND_VF_ASSOCIATION: u32 = 128;
pub const NVSP_MSG4_TYPE_SWITCH_DATA_PATH: u32 = 129;
pub const NVSP_MSG5_TYPE_OID_QUERY_EX: u32 = 131;
pub const NVSP_MSG5_TYPE_OID_QUERY_EX_COMPLETE: u32 = 132;
pub const NVSP_MSG5_TYPE_SUBCHANNEL: u32 = 133;
pub const NVSP_MSG5_TYPE_SEND_INDIRECTION_TABLE: u32 = 134;

pub const NVSP_STAT_NONE: u32 = 0;
pub const NVSP_STAT_SUCCESS: u32 = 1;
pub const NVSP_STAT_FAIL: u32 = 2;
pub const NVSP_STAT_INVALID_RNDIS_PKT: u32 = 5;
pub const NVSP_STAT_BUSY: u32 = 6;
pub const RMC_DATA: u32 = 0;
pub const RMC_CONTROL: u32 = 1;
pub const NVSP_INVALID_SECTION_INDEX: u32 = 0xFFFF_FFFF;
pub const SEND_TABLE_OFFSET: usize = 12;
pub const NVSP_PROTOCOL_VERSION_61: u32 = 0x0006_0001;

/// Bytes a sender pads every message to.
pub fn message_size(version: u32) -> usize {
    if version >= NVSP_PROTOCOL_VERSION_61 {
        40
    } else {
        32
    }
}

record!(Init [12] { min_version: u32 => 4, max_version: u32 => 8 });
record!(InitComplete [16] { negotiated_version: u32 => 4, max_mdl_chain: u32 => 8, status: u32 => 12 });
record!(SendNdisVersion [12] { major: u32 => 4, minor: u32 => 8 });
record!(SendReceiveBuffer [12] { gpadl_id: u32 => 4, id: u16 => 8 });
record!(RevokeReceiveBuffer [6] { id: u16 => 4 });
record!(SendSendBuffer [12] { gpadl_id: u32 => 4, id: u16 => 8 });
record!(SendSendBufferComplete [12] { status: u32 => 4, section_size: u32 => 8 });
record!(RevokeSendBuffer [6] { id: u16 => 4 });
record!(SendRndisPacket [16] { channel_type: u32 => 4, section_index: u32 => 8, section_size: u32 => 12 });
record!(SendRndisPacketComplete [8] { status: u32 => 4 });
record!(SendNdisConfig [20] { mtu: u32 => 4, capabilities: u64 => 12 });
record!(SendVfAssociation [12] { allocated: u32 => 4, serial: u32 => 8 });
record!(SwitchDataPath [8] { path: u32 => 4 });
record!(OidQueryEx [12] { object_type: u8 => 4, object_revision: u8 => 5, object_size: u16 => 6, oid: u32 => 8 });
record!(SubchannelRequest [12] { operation: u32 => 4, count: u32 => 8 });
record!(SubchannelComplete [12] { status: u32 => 4, count: u32 => 8 });
record!(ReceiveBufferSection [16] {
    offset: u32 => 0, sub_allocation_size: u32 => 4, count: u32 => 8, end_offset: u32 => 12,
});

macro_rules! nvsp_messages {
    ($($number:ident => $name:ident),* $(,)?) => {
        /// A message. Tables and query data are borrowed.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum NvspMessage<'a> {
            SendReceiveBufferComplete { status: u32, sections: &'a [u8] },
            OidQueryExComplete { status: u32, data: &'a [u8] },
            SendIndirectionTable { offset: u32, table: &'a [u8] },
            SubchannelComplete(SubchannelComplete),
            $($name($name),)*
        }

        impl<'a> NvspMessage<'a> {
            /// Decodes `data`; `completion` tells 133's answer from its request.
            pub fn parse(data: &'a [u8], completion: bool) -> Result<Self> {
                match Bytes::new("NVSP message", data, 4)?.u32(0)? {
                    NVSP_MSG5_TYPE_SUBCHANNEL if completion => {
                        SubchannelComplete::parse(data).map(Self::SubchannelComplete)
                    }
                    NVSP_MSG1_TYPE_SEND_RECV_BUF_COMPLETE => {
                        const WHAT: &str = "SendReceiveBufferComplete";
                        let bytes = Bytes::new(WHAT, data, 12)?;
                        let (status, count) = (bytes.u32(4)?, bytes.u32(8)? as usize);
                        if count > (bytes.len() - 12) / ReceiveBufferSection::SIZE {
                            return bad(WHAT, "its sections do not fit");
                        }
                        let sections = bytes.slice(12, count * ReceiveBufferSection::SIZE)?;
                        Ok(Self::SendReceiveBufferComplete { status, sections })
                    }
                    NVSP_MSG5_TYPE_OID_QUERY_EX_COMPLETE => {
                        let bytes = Bytes::new("OidQueryExComplete", data, 12)?;
                        let data = bytes.slice(12, bytes.u32(8)? as usize)?;
                        Ok(Self::OidQueryExComplete { status: bytes.u32(4)?, data })
                    }
                    NVSP_MSG5_TYPE_SEND_INDIRECTION_TABLE => {
                        const WHAT: &str = "SendIndirectionTable";
                        let bytes = Bytes::new(WHAT, data, SEND_TABLE_OFFSET)?;
                        let (count, offset) = (bytes.u32(4)? as usize, bytes.u32(8)?);
                        if (offset as usize) < SEND_TABLE_OFFSET {
                            return bad(WHAT, "the table lies in the header");
                        }
                        let table = bytes.slice(offset as usize, count.saturating_mul(4))?;
                        Ok(Self::SendIndirectionTable { offset, table })
                    }
                    $($number => $name::parse(data).map(Self::$name),)*
                    number => Err(WireError::Unknown { protocol: "NVSP", number }),
                }
            }

            /// The type number.
            pub fn number(&self) -> u32 {
                match self {
                    Self::SendReceiveBufferComplete { .. } => NVSP_MSG1_TYPE_SEND_RECV_BUF_COMPLETE,
                    Self::OidQueryExComplete { .. } => NVSP_MSG5_TYPE_OID_QUERY_EX_COMPLETE,
                    Self::SendIndirectionTable { .. } => NVSP_MSG5_TYPE_SEND_INDIRECTION_TABLE,
                    Self::SubchannelComplete(_) => NVSP_MSG5_TYPE_SUBCHANNEL,
                    $(Self::$name(_) => $number,)*
                }
            }

            /// The message's bytes, padded with zeros to at least `size`; `out` is cleared first.
            pub fn encode(&self, out: &mut Vec<u8>, size: usize) {
                out.clear();
                out.put_u32(self.number());
                match self {
                    Self::SendReceiveBufferComplete { status, sections } => {
                        out.put_u32(*status);
                        out.put_u32((sections.len() / ReceiveBufferSection::SIZE) as u32);
                        out.extend_from_slice(sections);
                    }
                    Self::OidQueryExComplete { status, data } => {
                        out.put_u32(*status);
                        out.put_u32(data.len() as u32);
                        out.extend_from_slice(data);
                    }
                    Self::SendIndirectionTable { offset, table } => {
                        out.put_u32((table.len() / 4) as u32);
                        out.put_u32(*offset);
                        out.put_zeros((*offset as usize).saturating_sub(SEND_TABLE_OFFSET));
                        out.extend_from_slice(table);
                    }
                    Self::SubchannelComplete(message) => message.put(out, 0),
                    $(Self::$name(message) => message.put(out, 0),)*
                }
                out.put_zeros(size.saturating_sub(out.len()));
            }

            /// Name and fields, as the Python twin has them.
            pub fn show(&self) -> Shown {
                match self {
                    Self::SendReceiveBufferComplete { status, sections } => {
                        let sections = sections
                            .chunks_exact(ReceiveBufferSection::SIZE)
                            .filter_map(|section| ReceiveBufferSection::parse(section).ok())
                            .map(|section| Value::Record(section.show().1))
                            .collect();
                        let status = Value::Int(u64::from(*status));
                        ("SendReceiveBufferComplete", vec![("status", status), ("sections", Value::List(sections))])
                    }
                    Self::OidQueryExComplete { status, data } => {
                        let status = Value::Int(u64::from(*status));
                        ("OidQueryExComplete", vec![("status", status), ("data", Value::Bytes(data.to_vec()))])
                    }
                    Self::SendIndirectionTable { offset, table } => {
                        let entry = |entry: &[u8]| {
                            Value::Int(entry.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)))
                        };
                        let table = table.chunks_exact(4).map(entry).collect();
                        let offset = Value::Int(u64::from(*offset));
                        ("SendIndirectionTable", vec![("table", Value::List(table)), ("offset", offset)])
                    }
                    Self::SubchannelComplete(message) => message.show(),
                    $(Self::$name(message) => message.show(),)*
                }
            }
        }
    };
}

nvsp_messages!(
    NVSP_MSG_TYPE_INIT => Init,
    NVSP_MSG_TYPE_INIT_COMPLETE => InitComplete,
    NVSP_MSG1_TYPE_SEND_NDIS_VER => SendNdisVersion,
    NVSP_MSG1_TYPE_SEND_RECV_BUF => SendReceiveBuffer,
    NVSP_MSG1_TYPE_REVOKE_RECV_BUF => RevokeReceiveBuffer,
    NVSP_MSG1_TYPE_SEND_SEND_BUF => SendSendBuffer,
    NVSP_MSG1_TYPE_SEND_SEND_BUF_COMPLETE => SendSendBufferComplete,
    NVSP_MSG1_TYPE_REVOKE_SEND_BUF => RevokeSendBuffer,
    NVSP_MSG1_TYPE_SEND_RNDIS_PKT => SendRndisPacket,
    NVSP_MSG1_TYPE_SEND_RNDIS_PKT_COMPLETE => SendRndisPacketComplete,
    NVSP_MSG2_TYPE_SEND_NDIS_CONFIG => SendNdisConfig,
    NVSP_MSG4_TYPE_SEND_VF_ASSOCIATION => SendVfAssociation,
    NVSP_MSG4_TYPE_SWITCH_DATA_PATH => SwitchDataPath,
    NVSP_MSG5_TYPE_OID_QUERY_EX => OidQueryEx,
    NVSP_MSG5_TYPE_SUBCHANNEL => SubchannelRequest,
);

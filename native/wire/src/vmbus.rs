//! VMBus channel messages (Linux include/linux/hyperv.h, openvmm vmbus_core/src/protocol.rs).
//!
//! `u32 type, u32 padding`, then the body; at most 240 bytes. Optional tails are None when their bytes are not there;
//! trailing bytes are ignored, as firmware posts 240 bytes whatever the message.

use crate::bytes::{Bytes, Put};
use crate::error::{bad, Result, WireError};
use crate::record::{record, Guid, Shown, Value};

pub const CHANNELMSG_OFFERCHANNEL: u32 = 1;
pub const CHANNELMSG_RESCIND_CHANNELOFFER: u32 = 2;
pub const CHANNELMSG_REQUESTOFFERS: u32 = 3;
pub const CHANNELMSG_ALLOFFERS_DELIVERED: u32 = 4;
pub const CHANNELMSG_OPENCHANNEL: u32 = 5;
pub const CHANNELMSG_OPENCHANNEL_RESULT: u32 = 6;
pub const CHANNELMSG_CLOSECHANNEL: u32 = 7;
pub const CHANNELMSG_GPADL_HEADER: u32 = 8;
pub const CHANNELMSG_GPADL_BODY: u32 = 9;
pub const CHANNELMSG_GPADL_CREATED: u32 = 10;
pub const CHANNELMSG_GPADL_TEARDOWN: u32 = 11;
pub const CHANNELMSG_GPADL_TORNDOWN: u32 = 12;
pub const CHANNELMSG_RELID_RELEASED: u32 = 13;
pub const CHANNELMSG_INITIATE_CONTACT: u32 = 14;
pub const CHANNELMSG_VERSION_RESPONSE: u32 = 15;
pub const CHANNELMSG_UNLOAD: u32 = 16;
pub const CHANNELMSG_UNLOAD_RESPONSE: u32 = 17;
pub const CHANNELMSG_OPEN_RESERVED_CHANNEL: u32 = 18;
pub const CHANNELMSG_CLOSE_RESERVED_CHANNEL: u32 = 19;
pub const CHANNELMSG_CLOSE_RESERVED_RESPONSE: u32 = 20;
pub const CHANNELMSG_TL_CONNECT_REQUEST: u32 = 21;
pub const CHANNELMSG_MODIFYCHANNEL: u32 = 22;
pub const CHANNELMSG_TL_CONNECT_RESULT: u32 = 23;
pub const CHANNELMSG_MODIFYCHANNEL_RESPONSE: u32 = 24;
pub const CHANNELMSG_MODIFY_CONNECTION: u32 = 25;
pub const CHANNELMSG_MODIFY_CONNECTION_RESPONSE: u32 = 26;
pub const CHANNELMSG_PAUSE: u32 = 27;
pub const CHANNELMSG_PAUSE_RESPONSE: u32 = 28;
pub const CHANNELMSG_RESUME: u32 = 29;

pub const MAXIMUM_MESSAGE_SIZE: usize = 240;
pub const HEADER_SIZE: usize = 8;
pub const USER_DATA_SIZE: usize = 120;
pub const MAXIMUM_RELID: u32 = 2047;
pub const VMBUS_MESSAGE_CONNECTION_ID: u32 = 1;
pub const VMBUS_MESSAGE_CONNECTION_ID_4: u32 = 4;
pub const VMBUS_MESSAGE_SINT: u32 = 2;
pub const VMBUS_MESSAGE_TYPE: u32 = 1;

record!(RescindChannelOffer [12] { relid: u32 => 8 });
record!(RequestOffers [8] {});
record!(AllOffersDelivered [8] {});
record!(OpenChannelResult [20] { relid: u32 => 8, open_id: u32 => 12, status: u32 => 16 });
record!(CloseChannel [12] { relid: u32 => 8 });
record!(GpadlCreated [20] { relid: u32 => 8, gpadl_id: u32 => 12, status: u32 => 16 });
record!(GpadlTeardown [16] { relid: u32 => 8, gpadl_id: u32 => 12 });
record!(GpadlTorndown [12] { gpadl_id: u32 => 8 });
record!(RelidReleased [12] { relid: u32 => 8 });
record!(Unload [8] {});
record!(UnloadResponse [8] {});
record!(OpenReservedChannel [28] {
    relid: u32 => 8, target_vp: u32 => 12, target_sint: u32 => 16, ring_gpadl: u32 => 20, downstream_page_offset: u32 => 24,
});
record!(CloseReservedChannel [20] { relid: u32 => 8, target_vp: u32 => 12, target_sint: u32 => 16 });
record!(CloseReservedResponse [12] { relid: u32 => 8 });
record!(ModifyChannel [16] { relid: u32 => 8, target_vp: u32 => 12 });
record!(TlConnectResult [44] { endpoint_id: Guid => 8, service_id: Guid => 24, status: u32 => 40 });
record!(ModifyChannelResponse [16] { relid: u32 => 8, status: u32 => 12 });
record!(ModifyConnection [24] { parent_to_child_monitor_gpa: u64 => 8, child_to_parent_monitor_gpa: u64 => 16 });
record!(ModifyConnectionResponse [9] { connection_state: u8 => 8 });
record!(Pause [8] {});
record!(PauseResponse [8] {});
record!(Resume [8] {});

/// 1, host to guest; `tail` is (dedicated interrupt, connection id), from Win7 on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OfferChannel {
    pub class_id: Guid,
    pub instance_id: Guid,
    pub flags: u16,
    pub mmio_megabytes: u16,
    pub user_data: [u8; USER_DATA_SIZE],
    pub sub_channel_index: u16,
    pub mmio_megabytes_optional: u16,
    pub relid: u32,
    pub monitor_id: u8,
    pub monitor_allocated: bool,
    pub tail: Option<(bool, u32)>,
}

/// 5, guest to host; `tail` is (connection id, event flag, flags), Copper.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpenChannel {
    pub relid: u32,
    pub open_id: u32,
    pub ring_gpadl: u32,
    pub target_vp: u32,
    pub downstream_page_offset: u32,
    pub user_data: [u8; USER_DATA_SIZE],
    pub tail: Option<(u32, u16, u16)>,
}

/// 8, guest to host; `range_data` is what this message carries of the `range_bytes`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GpadlHeader<'a> {
    pub relid: u32,
    pub gpadl_id: u32,
    pub range_bytes: u16,
    pub range_count: u16,
    pub range_data: &'a [u8],
}

/// 9, guest to host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GpadlBody<'a> {
    pub message_number: u32,
    pub gpadl_id: u32,
    pub range_data: &'a [u8],
}

/// 14, guest to host; `target_info` below 5.0 is the interrupt page, from 5.0 on SINT, VTL and feature flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InitiateContact {
    pub version: u32,
    pub target_vp: u32,
    pub target_info: u64,
    pub parent_to_child_monitor_gpa: u64,
    pub child_to_parent_monitor_gpa: u64,
    pub client_id: Option<Guid>,
}

/// 15, host to guest: 16 bytes, 20 with feature flags, 40 with monitor pages as well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VersionResponse {
    pub version_supported: bool,
    pub connection_state: u8,
    pub selected_version_or_connection_id: u32,
    pub feature_flags: Option<u32>,
    pub monitor_gpas: Option<(u64, u64)>,
}

/// 21, guest to host: 40 bytes, 56 with a silo id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TlConnectRequest {
    pub endpoint_id: Guid,
    pub service_id: Guid,
    pub silo_id: Option<Guid>,
}

fn guid(bytes: &Bytes<'_>, offset: usize) -> Result<Guid> {
    Ok(Guid(bytes.bytes(offset)?))
}

fn int(value: impl Into<u64>) -> Value {
    Value::Int(value.into())
}

fn optional(value: Option<impl Into<u64>>) -> Value {
    value.map_or(Value::None, int)
}

impl OfferChannel {
    fn parse(data: &[u8]) -> Result<Self> {
        let bytes = Bytes::new("OfferChannel", data, 190)?;
        let tail = if data.len() >= 196 {
            Some((bytes.u16(190)? & 1 != 0, bytes.u32(192)?))
        } else {
            None
        };
        Ok(Self {
            class_id: guid(&bytes, 8)?,
            instance_id: guid(&bytes, 24)?,
            flags: bytes.u16(56)?,
            mmio_megabytes: bytes.u16(58)?,
            user_data: bytes.bytes(60)?,
            sub_channel_index: bytes.u16(180)?,
            mmio_megabytes_optional: bytes.u16(182)?,
            relid: bytes.u32(184)?,
            monitor_id: bytes.u8(188)?,
            monitor_allocated: bytes.u8(189)? & 1 != 0,
            tail,
        })
    }

    fn put(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.class_id.0);
        out.extend_from_slice(&self.instance_id.0);
        out.put_zeros(16);
        out.put_u16(self.flags);
        out.put_u16(self.mmio_megabytes);
        out.extend_from_slice(&self.user_data);
        out.put_u16(self.sub_channel_index);
        out.put_u16(self.mmio_megabytes_optional);
        out.put_u32(self.relid);
        out.put_u8(self.monitor_id);
        out.put_u8(u8::from(self.monitor_allocated));
        if let Some((dedicated, connection_id)) = self.tail {
            out.put_u16(u16::from(dedicated));
            out.put_u32(connection_id);
        }
    }

    fn show(&self) -> Shown {
        let fields = vec![
            ("class_id", Value::Guid(self.class_id.0)),
            ("instance_id", Value::Guid(self.instance_id.0)),
            ("relid", int(self.relid)),
            ("connection_id", optional(self.tail.map(|tail| tail.1))),
            ("sub_channel_index", int(self.sub_channel_index)),
            ("flags", int(self.flags)),
            ("mmio_megabytes", int(self.mmio_megabytes)),
            ("mmio_megabytes_optional", int(self.mmio_megabytes_optional)),
            ("user_data", Value::Bytes(self.user_data.to_vec())),
            ("monitor_id", int(self.monitor_id)),
            ("monitor_allocated", Value::Bool(self.monitor_allocated)),
            (
                "is_dedicated_interrupt",
                self.tail.map_or(Value::None, |tail| Value::Bool(tail.0)),
            ),
        ];
        ("OfferChannel", fields)
    }
}

impl OpenChannel {
    fn parse(data: &[u8]) -> Result<Self> {
        let bytes = Bytes::new("OpenChannel", data, 148)?;
        let tail = if data.len() >= 156 {
            Some((bytes.u32(148)?, bytes.u16(152)?, bytes.u16(154)?))
        } else {
            None
        };
        Ok(Self {
            relid: bytes.u32(8)?,
            open_id: bytes.u32(12)?,
            ring_gpadl: bytes.u32(16)?,
            target_vp: bytes.u32(20)?,
            downstream_page_offset: bytes.u32(24)?,
            user_data: bytes.bytes(28)?,
            tail,
        })
    }

    fn put(&self, out: &mut Vec<u8>) {
        for word in [
            self.relid,
            self.open_id,
            self.ring_gpadl,
            self.target_vp,
            self.downstream_page_offset,
        ] {
            out.put_u32(word);
        }
        out.extend_from_slice(&self.user_data);
        if let Some((connection_id, event_flag, flags)) = self.tail {
            out.put_u32(connection_id);
            out.put_u16(event_flag);
            out.put_u16(flags);
        }
    }

    fn show(&self) -> Shown {
        let fields = vec![
            ("relid", int(self.relid)),
            ("open_id", int(self.open_id)),
            ("ring_gpadl", int(self.ring_gpadl)),
            ("target_vp", int(self.target_vp)),
            ("downstream_page_offset", int(self.downstream_page_offset)),
            ("user_data", Value::Bytes(self.user_data.to_vec())),
            ("connection_id", optional(self.tail.map(|tail| tail.0))),
            ("event_flag", optional(self.tail.map(|tail| tail.1))),
            ("flags", optional(self.tail.map(|tail| tail.2))),
        ];
        ("OpenChannel", fields)
    }
}

impl<'a> GpadlHeader<'a> {
    fn parse(data: &'a [u8]) -> Result<Self> {
        let bytes = Bytes::new("GpadlHeader", data, 20)?;
        let range_bytes = bytes.u16(16)?;
        let carried = (bytes.len() - 20).min(usize::from(range_bytes));
        Ok(Self {
            relid: bytes.u32(8)?,
            gpadl_id: bytes.u32(12)?,
            range_bytes,
            range_count: bytes.u16(18)?,
            range_data: bytes.slice(20, carried)?,
        })
    }
}

impl<'a> GpadlBody<'a> {
    fn parse(data: &'a [u8]) -> Result<Self> {
        let bytes = Bytes::new("GpadlBody", data, 16)?;
        Ok(Self {
            message_number: bytes.u32(8)?,
            gpadl_id: bytes.u32(12)?,
            range_data: bytes.slice(16, bytes.len() - 16)?,
        })
    }
}

impl InitiateContact {
    fn parse(data: &[u8]) -> Result<Self> {
        let bytes = Bytes::new("InitiateContact", data, 40)?;
        Ok(Self {
            version: bytes.u32(8)?,
            target_vp: bytes.u32(12)?,
            target_info: bytes.u64(16)?,
            parent_to_child_monitor_gpa: bytes.u64(24)?,
            child_to_parent_monitor_gpa: bytes.u64(32)?,
            client_id: if data.len() >= 56 {
                Some(guid(&bytes, 40)?)
            } else {
                None
            },
        })
    }

    fn show(&self) -> Shown {
        let fields = vec![
            ("version", int(self.version)),
            ("target_vp", int(self.target_vp)),
            ("target_info", int(self.target_info)),
            (
                "parent_to_child_monitor_gpa",
                int(self.parent_to_child_monitor_gpa),
            ),
            (
                "child_to_parent_monitor_gpa",
                int(self.child_to_parent_monitor_gpa),
            ),
            (
                "client_id",
                self.client_id.map_or(Value::None, |id| Value::Guid(id.0)),
            ),
        ];
        ("InitiateContact", fields)
    }
}

impl VersionResponse {
    fn parse(data: &[u8]) -> Result<Self> {
        let bytes = Bytes::new("VersionResponse", data, 16)?;
        Ok(Self {
            version_supported: bytes.u8(8)? != 0,
            connection_state: bytes.u8(9)?,
            selected_version_or_connection_id: bytes.u32(12)?,
            feature_flags: if data.len() >= 20 {
                Some(bytes.u32(16)?)
            } else {
                None
            },
            monitor_gpas: if data.len() >= 40 {
                Some((bytes.u64(24)?, bytes.u64(32)?))
            } else {
                None
            },
        })
    }

    fn put(&self, out: &mut Vec<u8>) {
        out.put_u8(u8::from(self.version_supported));
        out.put_u8(self.connection_state);
        out.put_u16(0);
        out.put_u32(self.selected_version_or_connection_id);
        if let Some(flags) = self.feature_flags {
            out.put_u32(flags);
            if let Some((to_child, to_parent)) = self.monitor_gpas {
                out.put_u32(0);
                out.put_u64(to_child);
                out.put_u64(to_parent);
            }
        }
    }

    fn show(&self) -> Shown {
        let fields = vec![
            ("version_supported", Value::Bool(self.version_supported)),
            ("connection_state", int(self.connection_state)),
            (
                "selected_version_or_connection_id",
                int(self.selected_version_or_connection_id),
            ),
            ("feature_flags", optional(self.feature_flags)),
            (
                "parent_to_child_monitor_gpa",
                optional(self.monitor_gpas.map(|gpas| gpas.0)),
            ),
            (
                "child_to_parent_monitor_gpa",
                optional(self.monitor_gpas.map(|gpas| gpas.1)),
            ),
        ];
        ("VersionResponse", fields)
    }
}

impl TlConnectRequest {
    fn parse(data: &[u8]) -> Result<Self> {
        let bytes = Bytes::new("TlConnectRequest", data, 40)?;
        let silo_id = if data.len() >= 56 {
            Some(guid(&bytes, 40)?)
        } else {
            None
        };
        Ok(Self {
            endpoint_id: guid(&bytes, 8)?,
            service_id: guid(&bytes, 24)?,
            silo_id,
        })
    }

    fn show(&self) -> Shown {
        let fields = vec![
            ("endpoint_id", Value::Guid(self.endpoint_id.0)),
            ("service_id", Value::Guid(self.service_id.0)),
            (
                "silo_id",
                self.silo_id.map_or(Value::None, |id| Value::Guid(id.0)),
            ),
        ];
        ("TlConnectRequest", fields)
    }
}

macro_rules! channel_messages {
    (fixed { $($number:ident => $name:ident),* $(,)? }) => {
        /// A channel message. Borrows what a GPADL message carries.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum ChannelMessage<'a> {
            OfferChannel(OfferChannel),
            OpenChannel(OpenChannel),
            GpadlHeader(GpadlHeader<'a>),
            GpadlBody(GpadlBody<'a>),
            InitiateContact(InitiateContact),
            VersionResponse(VersionResponse),
            TlConnectRequest(TlConnectRequest),
            $($name($name),)*
        }

        impl<'a> ChannelMessage<'a> {
            /// Decodes a SynIC message's payload, header included.
            pub fn parse(data: &'a [u8]) -> Result<Self> {
                const WHAT: &str = "VMBus channel message";
                if data.len() > MAXIMUM_MESSAGE_SIZE {
                    return bad(WHAT, "longer than 240 bytes");
                }
                match Bytes::new(WHAT, data, HEADER_SIZE)?.u32(0)? {
                    CHANNELMSG_OFFERCHANNEL => OfferChannel::parse(data).map(Self::OfferChannel),
                    CHANNELMSG_OPENCHANNEL => OpenChannel::parse(data).map(Self::OpenChannel),
                    CHANNELMSG_GPADL_HEADER => GpadlHeader::parse(data).map(Self::GpadlHeader),
                    CHANNELMSG_GPADL_BODY => GpadlBody::parse(data).map(Self::GpadlBody),
                    CHANNELMSG_INITIATE_CONTACT => InitiateContact::parse(data).map(Self::InitiateContact),
                    CHANNELMSG_VERSION_RESPONSE => VersionResponse::parse(data).map(Self::VersionResponse),
                    CHANNELMSG_TL_CONNECT_REQUEST => TlConnectRequest::parse(data).map(Self::TlConnectRequest),
                    $($number => $name::parse(data).map(Self::$name),)*
                    number => Err(WireError::Unknown { protocol: "VMBus", number }),
                }
            }

            /// The type number.
            pub fn number(&self) -> u32 {
                match self {
                    Self::OfferChannel(_) => CHANNELMSG_OFFERCHANNEL,
                    Self::OpenChannel(_) => CHANNELMSG_OPENCHANNEL,
                    Self::GpadlHeader(_) => CHANNELMSG_GPADL_HEADER,
                    Self::GpadlBody(_) => CHANNELMSG_GPADL_BODY,
                    Self::InitiateContact(_) => CHANNELMSG_INITIATE_CONTACT,
                    Self::VersionResponse(_) => CHANNELMSG_VERSION_RESPONSE,
                    Self::TlConnectRequest(_) => CHANNELMSG_TL_CONNECT_REQUEST,
                    $(Self::$name(_) => $number,)*
                }
            }

            /// The message's bytes.
            pub fn encode(&self) -> Vec<u8> {
                let mut out = Vec::with_capacity(MAXIMUM_MESSAGE_SIZE);
                out.put_u32(self.number());
                out.put_u32(0);
                match self {
                    Self::OfferChannel(message) => message.put(&mut out),
                    Self::OpenChannel(message) => message.put(&mut out),
                    Self::GpadlHeader(message) => {
                        out.put_u32(message.relid);
                        out.put_u32(message.gpadl_id);
                        out.put_u16(message.range_bytes);
                        out.put_u16(message.range_count);
                        out.extend_from_slice(message.range_data);
                    }
                    Self::GpadlBody(message) => {
                        out.put_u32(message.message_number);
                        out.put_u32(message.gpadl_id);
                        out.extend_from_slice(message.range_data);
                    }
                    Self::InitiateContact(message) => {
                        out.put_u32(message.version);
                        out.put_u32(message.target_vp);
                        out.put_u64(message.target_info);
                        out.put_u64(message.parent_to_child_monitor_gpa);
                        out.put_u64(message.child_to_parent_monitor_gpa);
                        if let Some(id) = message.client_id {
                            out.extend_from_slice(&id.0);
                        }
                    }
                    Self::VersionResponse(message) => message.put(&mut out),
                    Self::TlConnectRequest(message) => {
                        out.extend_from_slice(&message.endpoint_id.0);
                        out.extend_from_slice(&message.service_id.0);
                        if let Some(id) = message.silo_id {
                            out.extend_from_slice(&id.0);
                        }
                    }
                    $(Self::$name(message) => message.put(&mut out, 0),)*
                }
                out
            }

            /// Name and fields, as the Python twin has them.
            pub fn show(&self) -> Shown {
                match self {
                    Self::OfferChannel(message) => message.show(),
                    Self::OpenChannel(message) => message.show(),
                    Self::GpadlHeader(message) => ("GpadlHeader", vec![
                        ("relid", int(message.relid)),
                        ("gpadl_id", int(message.gpadl_id)),
                        ("range_bytes", int(message.range_bytes)),
                        ("range_count", int(message.range_count)),
                        ("range_data", Value::Bytes(message.range_data.to_vec())),
                    ]),
                    Self::GpadlBody(message) => ("GpadlBody", vec![
                        ("message_number", int(message.message_number)),
                        ("gpadl_id", int(message.gpadl_id)),
                        ("range_data", Value::Bytes(message.range_data.to_vec())),
                    ]),
                    Self::InitiateContact(message) => message.show(),
                    Self::VersionResponse(message) => message.show(),
                    Self::TlConnectRequest(message) => message.show(),
                    $(Self::$name(message) => message.show(),)*
                }
            }
        }
    };
}

channel_messages!(fixed {
    CHANNELMSG_RESCIND_CHANNELOFFER => RescindChannelOffer,
    CHANNELMSG_REQUESTOFFERS => RequestOffers,
    CHANNELMSG_ALLOFFERS_DELIVERED => AllOffersDelivered,
    CHANNELMSG_OPENCHANNEL_RESULT => OpenChannelResult,
    CHANNELMSG_CLOSECHANNEL => CloseChannel,
    CHANNELMSG_GPADL_CREATED => GpadlCreated,
    CHANNELMSG_GPADL_TEARDOWN => GpadlTeardown,
    CHANNELMSG_GPADL_TORNDOWN => GpadlTorndown,
    CHANNELMSG_RELID_RELEASED => RelidReleased,
    CHANNELMSG_UNLOAD => Unload,
    CHANNELMSG_UNLOAD_RESPONSE => UnloadResponse,
    CHANNELMSG_OPEN_RESERVED_CHANNEL => OpenReservedChannel,
    CHANNELMSG_CLOSE_RESERVED_CHANNEL => CloseReservedChannel,
    CHANNELMSG_CLOSE_RESERVED_RESPONSE => CloseReservedResponse,
    CHANNELMSG_MODIFYCHANNEL => ModifyChannel,
    CHANNELMSG_TL_CONNECT_RESULT => TlConnectResult,
    CHANNELMSG_MODIFYCHANNEL_RESPONSE => ModifyChannelResponse,
    CHANNELMSG_MODIFY_CONNECTION => ModifyConnection,
    CHANNELMSG_MODIFY_CONNECTION_RESPONSE => ModifyConnectionResponse,
    CHANNELMSG_PAUSE => Pause,
    CHANNELMSG_PAUSE_RESPONSE => PauseResponse,
    CHANNELMSG_RESUME => Resume,
});

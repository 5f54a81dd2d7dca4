//! Sizes and bounds, the same as in `netvsp/limits.py`.

pub const ETHERNET_HEADER: usize = 14;
/// NVSP counts the MTU with the Ethernet header.
pub const MTU_DEFAULT: usize = 1500 + ETHERNET_HEADER;
pub const CONTROL_RESERVE: usize = 16;
/// Channels of one NIC.
pub const MAX_QUEUES: usize = 64;
pub const MAX_RANGES_PER_PACKET: usize = 375;
pub const MAX_RSC_RANGES: usize = 562;
/// Segments of one large send.
pub const MAX_SEGMENTS: usize = 2048;
pub const MAX_GPA_RANGES: usize = 64;
pub const MAX_MESSAGE_BYTES: u64 = 8 * 65536;
pub const MAX_CONTROL_BYTES: usize = 8192;
pub const MAX_CONTROL_QUEUED: usize = 256;
pub const MAX_CONTROL_BACKLOG_BYTES: usize = 100 * 1024;
pub const MAX_COMPLETIONS_QUEUED: usize = 1024;
pub const TAP_PACKETS: usize = 4096;
pub const TAP_BYTES: usize = 16 << 20;
pub const MAX_PACKETS_PER_MESSAGE: usize = 8;
/// Ring packets taken in one call: no flood of control packets holds a worker.
pub const PACKETS_PER_TURN: usize = 64;

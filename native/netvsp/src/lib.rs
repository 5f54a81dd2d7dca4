//! The host end of a synthetic NIC's data path: a guest's rings in, frames for the switch out, and back.
//!
//! `netvsp/channel.py` is the document of record; this crate does the same on a switch worker.
//!
//! # Data structures
//! [`Channel`] is the control half: it queues commands for the worker and takes what the worker hands up.
//! [`ChannelEndpoint`] is the worker's half, an `Endpoint` of the switch. Both share [`shared::Shared`].
//!
//! # Life cycle
//! `Channel::open` -> `Channel::endpoint` (once) -> attached to a switch port -> commands as the handshake goes on ->
//! detached: the worker drops the endpoint, and with it every view of guest memory.
//!
//! # Threads
//! The control half may be used from any thread and never waits for the worker. The endpoint takes a lock only when
//! there are commands or control messages, and per packet of data only while a tap is on.

#![forbid(unsafe_op_in_unsafe_fn)]

pub mod channel;
pub mod checksum;
mod endpoint;
mod fd;
mod guest_bytes;
pub mod limits;
mod queue;
mod receive_buffer;
mod receive_path;
mod rndis_data;
mod rss;
pub mod shared;

pub use channel::Channel;
pub use endpoint::ChannelEndpoint;

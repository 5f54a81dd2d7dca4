//! The byte formats that both sides of a partition's door share: VMBus, NVSP, RNDIS, hypercalls, door frames.
//!
//! `vswitch_wire` (Python) is the document of record; property tests hold the two to the same answers.

#![forbid(unsafe_code)]

mod bytes;
pub mod door;
pub mod error;
pub mod gpadl;
pub mod hypercall;
pub mod nvsp;
pub mod packet;
mod record;
pub mod rndis;
pub mod vmbus;

pub use error::{Result, WireError};
pub use record::{Guid, Shown, Value};

//! The guest end of a synthetic NIC's data path: TAP to ring and back.
//!
//! One `Worker` per virtual processor runs one `Path` per open channel. `netvsc/datapath.py` is the document of record.

pub mod frames;
pub mod link;
pub mod path;
pub mod worker;

//! The native switch engine: the fast twin of `vswitch/engine/python/`, which is the document of record.
//!
//! # Life cycle
//! [`worker::Worker::start`] -> add ports -> attach [`endpoint::Endpoint`]s -> traffic -> detach -> drop the worker.
//!
//! # Threads
//! One worker thread per datapath owns the [`core::Core`]: ports, MAC table, flow cache, extensions' links. Owners
//! reach it by [`worker::Worker::call`]; captures ([`tap::Tap`]) and events ([`events::EventQueue`]) leave it by
//! bounded queues with an eventfd. Nothing on the packet path takes a lock or calls into Python.

pub mod clock;
pub mod core;
pub mod counters;
pub mod drops;
pub mod endpoint;
pub mod events;
pub mod fields;
pub mod flows;
mod hash;
mod jobs;
pub mod limits;
pub mod mac;
pub mod parse;
mod poller;
pub mod program;
pub mod queue;
mod segment;
pub mod tap;
pub mod upcall;
mod walk;
pub mod worker;

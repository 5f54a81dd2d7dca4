//! The VMM: one KVM partition, as the guest's side of a door (docs/door.md).
//!
//! `machine` is the process's main thread, `vcpu` each virtual processor's. What a guest can reach is `devices`, `synic`, and
//! the host behind `requests`; everything else is KVM's.

#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

pub mod args;
pub mod boot;
mod calls;
mod clock;
pub mod console;
mod control;
mod cpuid;
pub mod devices;
pub mod door;
pub mod error;
mod exits;
pub mod failure;
mod kick;
pub mod machine;
pub mod memory;
mod privileges;
pub mod probe;
mod requests;
pub mod sandbox;
pub mod start;
pub mod synic;
mod terminate;
mod vcpu;
mod vm;

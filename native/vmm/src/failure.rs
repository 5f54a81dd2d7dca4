//! A fault of the VMM's own: it ends the process, whichever thread it happens in.

use std::panic;
use std::process;

/// The process's exit status after a panic.
pub const STATUS: i32 = 6;

/// From now on a panic in any thread says where it happened and ends the process. Otherwise the thread would be gone and the
/// machine half alive: a guest without one of its processors, or a host that waits for an answer for ever.
pub fn end_on_panic() {
    panic::set_hook(Box::new(|what| {
        eprintln!("vswitch-vmm: a fault of its own: {what}");
        // Not abort(): the first process of a namespace gets no signal of its own, and the sandbox would be blamed.
        process::exit(STATUS);
    }));
}

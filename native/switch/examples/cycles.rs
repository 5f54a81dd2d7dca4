//! What the switch itself costs per frame: a source that yields full batches, a sink that takes them, no rings.
//!
//! `cargo run --release -p vswitch-switch --example cycles` prints the median CPU time per frame of several runs, for one
//! cached flow, for many, and with the pipeline walked once per batch (cache flushed before it).

use std::os::fd::RawFd;
use std::sync::Arc;

use vswitch_switch::clock::Clock;
use vswitch_switch::core::Core;
use vswitch_switch::drops::DropReason;
use vswitch_switch::endpoint::{Batch, Endpoint, FrameRef, Meta, BATCH};
use vswitch_switch::events::EventQueue;
use vswitch_switch::limits::Limits;

const FLOWS: usize = 4096;

struct Source {
    frames: Vec<[u8; 60]>,
    next: usize,
}

impl Endpoint for Source {
    fn wake_fd(&self) -> RawFd {
        -1
    }

    fn receive(&mut self, batch: &mut Batch) -> bool {
        while !batch.is_full() {
            if !batch.push(&self.frames[self.next], Meta::default()) {
                break;
            }
            self.next = (self.next + 1) % self.frames.len();
        }
        true
    }

    fn transmit(&mut self, _frame: &FrameRef<'_>) -> Result<(), DropReason> {
        Ok(())
    }

    fn flush(&mut self) {}

    fn rearm(&mut self) -> bool {
        true
    }
}

fn frame(source: u32) -> [u8; 60] {
    let mut out = [0; 60];
    out[..14].copy_from_slice(&[2, 0, 0, 0, 0xFF, 2, 2, 0, 0, 0, 0, 1, 8, 0]);
    out[8..12].copy_from_slice(&source.to_be_bytes());
    out[14] = 0x45;
    out[17] = 46;
    out[22] = 64;
    out[23] = 17;
    out[39] = 26;
    out
}

/// CPU time of this thread: others may share the core.
fn cpu_ns() -> u64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `time` is valid for the call.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

fn measure(name: &str, flows: usize, flush: bool) -> Result<(), Box<dyn std::error::Error>> {
    let limits = Limits {
        mac_entries: 2 * FLOWS,
        flow_entries: 2 * FLOWS,
        ..Limits::default()
    };
    let mut core = Core::new(limits, Clock::system(), Arc::new(EventQueue::new()?));
    let frames = (1..=flows as u32).map(frame).collect();
    let mut answer = frame(1);
    answer[..6].copy_from_slice(&[2, 0, 0, 0, 0, 1]);
    answer[6..12].copy_from_slice(&[2, 0, 0, 0, 0xFF, 2]);
    for (port_id, frames) in [(1, frames), (2, vec![answer])] {
        core.add_port(port_id, format!("p{port_id}"), 1500)?;
        core.attach(port_id, Box::new(Source { frames, next: 0 }));
    }
    let mut batch = Batch::new();
    core.service(2, &mut batch);
    for _ in 0..2 * FLOWS / BATCH {
        core.service(1, &mut batch);
    }
    let mut runs: Vec<f64> = (0..9)
        .map(|_| {
            let start = cpu_ns();
            let rounds = 10_000;
            for _ in 0..rounds {
                if flush {
                    core.flows().flush();
                }
                core.service(1, &mut batch);
            }
            (cpu_ns() - start) as f64 / (rounds * BATCH) as f64
        })
        .collect();
    runs.sort_by(f64::total_cmp);
    println!("{name:<42} {:6.1} ns per frame", runs[runs.len() / 2]);
    Ok(())
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    measure("one flow, cached", 1, false)?;
    measure(&format!("{FLOWS} flows, cached"), FLOWS, false)?;
    measure("one flow, pipeline walked once per batch", 1, true)?;
    Ok(())
}

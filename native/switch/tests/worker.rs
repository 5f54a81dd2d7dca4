//! A datapath with its worker thread, driven from outside as the Python module drives it.

#![allow(clippy::unwrap_used)] // helpers of tests fail by panicking, as the tests do

use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use vswitch_switch::clock::Clock;
use vswitch_switch::drops::DropReason;
use vswitch_switch::endpoint::{Batch, Endpoint, FrameRef, Meta};
use vswitch_switch::events::Event;
use vswitch_switch::limits::Limits;
use vswitch_switch::queue::{pair, QueuePeer};
use vswitch_switch::tap::{Tap, TapFilter};
use vswitch_switch::worker::{Worker, WorkerGone};

fn frame(destination: u8, source: u8) -> Vec<u8> {
    let mut out = vec![
        2,
        0,
        0,
        0,
        0,
        destination,
        2,
        0,
        0,
        0,
        0,
        source,
        0x88,
        0xB5,
    ];
    out.resize(60, 0x5A);
    out
}

fn broadcast(source: u8) -> Vec<u8> {
    let mut out = frame(0, source);
    out[..6].fill(0xFF);
    out
}

fn start(clock: Clock) -> Worker {
    Worker::start(Limits::default(), clock).unwrap()
}

fn add(worker: &Worker, port_id: u32) -> QueuePeer {
    let (peer, endpoint) = pair(1024).unwrap();
    worker
        .call(move |state| {
            state
                .core
                .add_port(port_id, format!("p{port_id}"), 1500)
                .unwrap();
            state.attach(port_id, Box::new(endpoint)).unwrap();
        })
        .unwrap();
    peer
}

/// Waits for `count` frames that the worker delivers by itself.
fn arrived(peer: &QueuePeer, count: usize) -> Vec<Vec<u8>> {
    let deadline = Instant::now() + Duration::from_secs(5);
    let mut out = Vec::new();
    while out.len() < count && Instant::now() < deadline {
        out.extend(peer.received().into_iter().map(|(data, _)| data));
        std::thread::sleep(Duration::from_millis(1));
    }
    out
}

#[test]
fn a_sleeping_worker_wakes_for_a_frame() {
    let worker = start(Clock::system());
    let (a, b) = (add(&worker, 1), add(&worker, 2));
    for round in 0..20u64 {
        std::thread::sleep(Duration::from_millis(round % 3));
        assert!(a.send(frame(2, 1), Meta::default()));
        assert_eq!(arrived(&b, 1), [frame(2, 1)], "round {round}");
    }
}

#[test]
fn bursts_from_two_sides_all_arrive() {
    let worker = start(Clock::system());
    let (a, b) = (add(&worker, 1), add(&worker, 2));
    for _ in 0..500 {
        assert!(a.send(frame(2, 1), Meta::default()));
        assert!(b.send(frame(1, 2), Meta::default()));
    }
    assert_eq!(arrived(&a, 500).len(), 500);
    assert_eq!(arrived(&b, 500).len(), 500);
    let counters = worker
        .call(|state| state.core.port_counters(1))
        .unwrap()
        .unwrap();
    assert_eq!((counters.rx.packets, counters.tx.packets), (500, 500));
}

#[test]
fn addresses_age_by_the_clock_that_was_given() {
    let worker = start(Clock::manual());
    let (a, _b) = (add(&worker, 1), add(&worker, 2));
    assert!(a.send(broadcast(1), Meta::default()));
    let rows = |worker: &Worker| {
        worker.call(|state| {
            state.barrier(1, &mut Batch::new());
            state.core.macs().rows().len()
        })
    };
    assert_eq!(rows(&worker), Ok(1));
    worker.clock.advance(301_000_000_000);
    worker.call(|state| state.core.run_timers()).unwrap();
    assert_eq!(rows(&worker), Ok(0));
}

/// A guest that sends without a pause.
struct Flood(QueuePeer);

impl Endpoint for Flood {
    fn wake_fd(&self) -> RawFd {
        self.0.fd()
    }

    fn receive(&mut self, batch: &mut Batch) -> bool {
        while batch.push(&broadcast(9), Meta::default()) {}
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

#[test]
fn a_barrier_ends_although_a_guest_never_stops_sending() {
    let worker = Arc::new(start(Clock::manual()));
    let _a = add(&worker, 1);
    let (peer, _endpoint) = pair(1).unwrap();
    let (done, finished) = std::sync::mpsc::channel();
    let caller = Arc::clone(&worker);
    std::thread::spawn(move || {
        caller
            .call(|state| {
                state.core.add_port(2, "p2".into(), 1500).unwrap();
                state.core.attach(2, Box::new(Flood(peer)));
                state.barrier(1, &mut Batch::new());
                state.core.detach(2);
            })
            .unwrap();
        done.send(()).unwrap();
    });
    let ended = finished.recv_timeout(Duration::from_secs(20));
    assert!(ended.is_ok(), "the worker is held for ever");
}

#[test]
fn a_closed_tap_costs_and_gets_nothing() {
    let worker = start(Clock::manual());
    let (a, _b) = (add(&worker, 1), add(&worker, 2));
    let filter = TapFilter {
        ports: None,
        snaplen: 20,
        drops: true,
    };
    let tap = Arc::new(
        Tap::new(
            filter,
            &Limits {
                capture_frames: 3,
                ..Limits::default()
            },
        )
        .unwrap(),
    );
    let shared = tap.clone();
    worker
        .call(move |state| state.core.add_tap(shared))
        .unwrap();
    let flush = |worker: &Worker| {
        worker
            .call(|state| state.barrier(1, &mut Batch::new()))
            .unwrap()
    };
    assert!(a.send(frame(2, 1), Meta::default()));
    assert!(a.send(frame(2, 1), Meta::default()));
    flush(&worker);
    assert_eq!(tap.lost(), 1);
    let seen = tap.read(100);
    assert_eq!(
        seen.iter()
            .map(|one| (one.packet_id, one.outward))
            .collect::<Vec<_>>(),
        [(1, false), (1, true), (2, false)]
    );
    assert!(seen
        .iter()
        .all(|one| one.data.len() == 20 && one.original_length == 60));
    tap.close();
    assert!(a.send(frame(2, 1), Meta::default()));
    flush(&worker);
    assert!(tap.read(100).is_empty());
    assert_eq!(Arc::strong_count(&tap), 1, "the worker has let go of it");
}

/// Panics in the call that it was made for; tells its owner and its drop.
struct Clumsy {
    peer: QueuePeer,
    call: &'static str,
    told: Arc<std::sync::Mutex<Vec<String>>>,
}

impl Clumsy {
    fn step(&self, call: &str) {
        assert!(call != self.call, "{call} went wrong");
    }
}

impl Endpoint for Clumsy {
    fn wake_fd(&self) -> RawFd {
        self.peer.fd()
    }

    fn receive(&mut self, batch: &mut Batch) -> bool {
        if self.call == "receive" {
            assert!(batch.push(&broadcast(7), Meta::default()));
        }
        self.step("receive");
        false
    }

    fn transmit(&mut self, _frame: &FrameRef<'_>) -> Result<(), DropReason> {
        self.step("transmit");
        Ok(())
    }

    fn flush(&mut self) {
        self.step("flush");
    }

    fn rearm(&mut self) -> bool {
        self.step("rearm");
        false
    }

    fn failed(&mut self, why: &str) {
        self.told.lock().unwrap().push(why.to_owned());
    }
}

impl Drop for Clumsy {
    fn drop(&mut self) {
        self.told.lock().unwrap().push("dropped".into());
    }
}

#[test]
fn an_endpoint_that_panics_is_let_go_of_and_the_others_go_on() {
    for call in ["receive", "transmit", "flush", "rearm"] {
        let worker = start(Clock::system());
        let (a, b) = (add(&worker, 1), add(&worker, 2));
        let told = Arc::new(std::sync::Mutex::new(Vec::new()));
        let (peer, _other) = pair(1).unwrap();
        let clumsy = Clumsy {
            peer,
            call,
            told: told.clone(),
        };
        worker
            .call(|state| {
                state.core.add_port(3, "p3".into(), 1500).unwrap();
                state.attach(3, Box::new(clumsy)).unwrap();
            })
            .unwrap();
        for _ in 0..20 {
            assert!(a.send(broadcast(1), Meta::default()), "{call}");
        }
        let got: Vec<_> = arrived(&b, 20);
        assert!(got.len() >= 20, "{call}: the other port got {}", got.len());
        let deadline = Instant::now() + Duration::from_secs(5);
        while told.lock().unwrap().len() < 2 && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        let words = told.lock().unwrap().clone();
        assert_eq!(words.len(), 2, "{call}: {words:?}");
        assert!(
            words[0].contains(&format!("{call} went wrong")),
            "{words:?}"
        );
        assert_eq!(words[1], "dropped");
        let events = worker.events.take();
        assert!(events
            .iter()
            .any(|event| matches!(event, Event::PortDisconnected { port_id: 3, .. })));
        let state = worker
            .call(|state| {
                let failed = state.core.switch_counters().endpoints_failed;
                (state.core.port_state(3), failed)
            })
            .unwrap();
        assert_eq!(state, (Some(false), 1), "{call}");
    }
}

/// Counts calls; after it was dropped none may come.
struct Watched {
    wake: RawFd,
    calls: Arc<AtomicUsize>,
    dropped: Arc<AtomicBool>,
}

impl Watched {
    fn touch(&self) {
        assert!(!self.dropped.load(Ordering::SeqCst));
        self.calls.fetch_add(1, Ordering::SeqCst);
    }
}

impl Endpoint for Watched {
    fn wake_fd(&self) -> RawFd {
        self.wake
    }

    fn receive(&mut self, batch: &mut Batch) -> bool {
        self.touch();
        batch.drop_one(DropReason::InvalidPacket);
        assert!(batch.push(&broadcast(9), Meta::default()));
        true
    }

    fn transmit(&mut self, _frame: &FrameRef<'_>) -> Result<(), DropReason> {
        self.touch();
        Err(DropReason::NotReady)
    }

    fn flush(&mut self) {
        self.touch();
    }

    fn rearm(&mut self) -> bool {
        self.touch();
        true
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.dropped.store(true, Ordering::SeqCst);
        vswitch_memory::eventfd::signal(self.wake);
    }
}

#[test]
fn after_detach_nothing_touches_the_endpoint() {
    let worker = start(Clock::system());
    let other = add(&worker, 2);
    for round in 0..50 {
        let (calls, dropped) = (
            Arc::new(AtomicUsize::new(0)),
            Arc::new(AtomicBool::new(false)),
        );
        let wake = vswitch_memory::eventfd::create().unwrap();
        let endpoint = Watched {
            wake,
            calls: calls.clone(),
            dropped: dropped.clone(),
        };
        worker
            .call(move |state| {
                if state.core.port_state(1).is_none() {
                    state.core.add_port(1, "busy".into(), 1500).unwrap();
                }
                state.attach(1, Box::new(endpoint)).unwrap();
            })
            .unwrap();
        assert!(other.send(frame(9, 2), Meta::default()));
        while calls.load(Ordering::SeqCst) < 20 {
            std::thread::yield_now();
        }
        worker.call(|state| state.detach(1)).unwrap();
        assert!(worker.quiesce());
        assert!(dropped.load(Ordering::SeqCst), "round {round}");
        let after = calls.load(Ordering::SeqCst);
        std::thread::sleep(Duration::from_millis(1));
        assert_eq!(calls.load(Ordering::SeqCst), after);
        other.received();
        // SAFETY: the test made the fd, and nobody uses it any more.
        unsafe { libc::close(wake) };
    }
    let counters = worker
        .call(|state| state.core.port_counters(1))
        .unwrap()
        .unwrap();
    assert!(
        counters
            .rx
            .drops
            .nonzero()
            .contains(&(2, counters.rx.dropped)),
        "the endpoint's own drops are counted"
    );
}

#[test]
fn a_stopped_worker_says_so() {
    let worker = start(Clock::system());
    worker.stop();
    assert_eq!(worker.call(|_| ()), Err(WorkerGone));
    worker.stop();
}

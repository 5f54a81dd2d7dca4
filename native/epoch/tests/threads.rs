//! Epochs under real threads.
#![cfg(not(loom))]

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use vswitch_epoch::Epochs;

#[test]
fn a_worker_inside_a_batch_holds_back_what_it_may_still_touch() {
    let epochs = Epochs::new();
    let worker = epochs.register();
    worker.unpark();
    let epoch = epochs.advance();
    assert!(!epochs.passed(epoch));
    worker.quiesce();
    assert!(epochs.passed(epoch));
}

#[test]
fn a_parked_or_gone_worker_delays_nobody() {
    let epochs = Epochs::new();
    let parked = epochs.register();
    let gone = epochs.register();
    gone.unpark();
    parked.unpark();
    parked.park();
    let epoch = epochs.advance();
    assert!(!epochs.passed(epoch));
    drop(gone);
    assert!(epochs.passed(epoch));
}

#[test]
fn wait_gives_up_when_a_worker_does_not_pass() {
    let epochs = Epochs::new();
    let worker = epochs.register();
    worker.unpark();
    assert!(!epochs.wait(Duration::from_millis(5)));
    worker.quiesce();
    worker.park();
    assert!(epochs.wait(Duration::from_millis(5)));
}

#[test]
fn deferred_actions_run_in_order_and_only_when_due() {
    let epochs = Epochs::new();
    let worker = epochs.register();
    worker.unpark();
    let order = Arc::new(Mutex::new(Vec::new()));
    for number in 0..3 {
        let order = Arc::clone(&order);
        epochs.defer(move || order.lock().unwrap().push(number));
    }
    assert_eq!(epochs.collect(), 3);
    worker.quiesce();
    assert_eq!(epochs.collect(), 0);
    assert_eq!(*order.lock().unwrap(), [0, 1, 2]);
}

#[test]
fn no_worker_sees_an_object_after_its_epoch_passed() {
    let epochs = Epochs::new();
    let current = Arc::new(Mutex::new(Arc::new(AtomicBool::new(true))));
    let stop = Arc::new(AtomicBool::new(false));
    let broken = Arc::new(AtomicUsize::new(0));
    let threads: Vec<_> = (0..2)
        .map(|_| {
            let (worker, current, stop, broken) = (
                epochs.register(),
                Arc::clone(&current),
                Arc::clone(&stop),
                Arc::clone(&broken),
            );
            std::thread::spawn(move || {
                worker.unpark();
                while !stop.load(Ordering::Relaxed) {
                    let alive = Arc::clone(&current.lock().unwrap());
                    for _ in 0..20 {
                        if !alive.load(Ordering::Relaxed) {
                            broken.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                    drop(alive);
                    worker.quiesce();
                }
            })
        })
        .collect();
    for _ in 0..200 {
        let old = std::mem::replace(
            &mut *current.lock().unwrap(),
            Arc::new(AtomicBool::new(true)),
        );
        assert!(epochs.wait(Duration::from_secs(10)));
        old.store(false, Ordering::Relaxed);
    }
    stop.store(true, Ordering::Relaxed);
    for thread in threads {
        thread.join().unwrap();
    }
    assert_eq!(broken.load(Ordering::Relaxed), 0);
}

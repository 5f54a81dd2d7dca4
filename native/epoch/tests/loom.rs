//! Epochs under every interleaving that loom can make: `RUSTFLAGS="--cfg loom" cargo test -p vswitch-epoch --test loom`.
#![cfg(loom)]

use loom::cell::UnsafeCell;
use loom::sync::atomic::{AtomicBool, Ordering};
use loom::sync::Arc;
use loom::thread;
use vswitch_epoch::Epochs;

/// An object that workers find through `linked` and read without a lock; loom reports a race if it is freed under them.
struct World {
    linked: AtomicBool,
    object: UnsafeCell<u32>,
}

fn use_object(world: &World) {
    if world.linked.load(Ordering::Acquire) {
        world
            .object
            .with(|object| assert_eq!(unsafe { *object }, 7));
    }
}

fn world() -> Arc<World> {
    Arc::new(World {
        linked: AtomicBool::new(true),
        object: UnsafeCell::new(7),
    })
}

fn retire(epochs: &Epochs, world: &World) {
    world.linked.store(false, Ordering::Release);
    let epoch = epochs.advance();
    if epochs.passed(epoch) {
        world.object.with_mut(|object| unsafe { *object = 0 });
    }
}

#[test]
fn an_object_is_never_freed_under_a_worker_between_quiescent_points() {
    loom::model(|| {
        let epochs = Epochs::new();
        let world = world();
        let worker = epochs.register();
        worker.unpark();
        let thread = {
            let world = Arc::clone(&world);
            thread::spawn(move || {
                use_object(&world);
                worker.quiesce();
                use_object(&world);
            })
        };
        retire(&epochs, &world);
        thread.join().unwrap();
    });
}

#[test]
fn an_object_is_never_freed_under_a_worker_that_wakes_up() {
    loom::model(|| {
        let epochs = Epochs::new();
        let world = world();
        let worker = epochs.register();
        let thread = {
            let world = Arc::clone(&world);
            thread::spawn(move || {
                worker.unpark();
                use_object(&world);
                worker.park();
            })
        };
        retire(&epochs, &world);
        thread.join().unwrap();
    });
}

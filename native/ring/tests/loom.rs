//! The ring's index, mask and pending-size protocol under every interleaving that loom can make.
//!
//! `RUSTFLAGS="--cfg loom" cargo test -p vswitch-ring --test loom --release`
#![cfg(loom)]

use loom::cell::UnsafeCell;
use loom::sync::atomic::{fence, AtomicU32, Ordering};
use loom::sync::Arc;
use loom::thread;
use vswitch_ring::protocol::{Consumer, Control, Field, Producer};

const SIZE: u32 = 32;

#[derive(Default)]
struct Words {
    words: [AtomicU32; 5],
}

struct Shared(Arc<Words>);

fn index(field: Field) -> usize {
    match field {
        Field::WriteIndex => 0,
        Field::ReadIndex => 1,
        Field::InterruptMask => 2,
        Field::PendingSendSize => 3,
        Field::FeatureBits => 4,
    }
}

impl Control for Shared {
    fn load(&self, field: Field) -> u32 {
        self.0.words[index(field)].load(Ordering::Acquire)
    }

    fn store(&self, field: Field, value: u32) {
        self.0.words[index(field)].store(value, Ordering::Release);
    }

    fn fence(&self) {
        fence(Ordering::SeqCst);
    }
}

/// An eventfd: a signal that has not been consumed.
#[derive(Default)]
struct Signal(AtomicU32);

impl Signal {
    fn raise(&self) {
        self.0.store(1, Ordering::Release);
    }

    fn raised(&self) -> bool {
        self.0.load(Ordering::Acquire) == 1
    }
}

struct Data(Vec<UnsafeCell<u32>>);

fn data() -> Arc<Data> {
    Arc::new(Data((0..SIZE / 8).map(|_| UnsafeCell::new(0)).collect()))
}

#[test]
fn bytes_are_visible_before_the_index_that_covers_them() {
    loom::model(|| {
        let words = Arc::new(Words::default());
        let data = data();
        let mut producer = Producer::new(Shared(Arc::clone(&words)), SIZE).unwrap();
        let mut consumer = Consumer::new(Shared(Arc::clone(&words)), SIZE).unwrap();
        let writer = {
            let data = Arc::clone(&data);
            thread::spawn(move || {
                for value in 1..=2u32 {
                    let at = producer.reserve(8).unwrap().unwrap();
                    data.0[at as usize / 8].with_mut(|slot| unsafe { *slot = value });
                    producer.commit().unwrap();
                }
            })
        };
        let mut expected = 1;
        while consumer.available().unwrap() != 0 {
            let at = consumer.position();
            data.0[at as usize / 8].with(|slot| assert_eq!(unsafe { *slot }, expected));
            expected += 1;
            consumer.advance(8);
            consumer.commit().unwrap();
        }
        writer.join().unwrap();
    });
}

#[test]
fn a_reader_that_goes_to_sleep_is_woken_or_sees_the_data() {
    loom::model(|| {
        let words = Arc::new(Words::default());
        let signal = Arc::new(Signal::default());
        let mut producer = Producer::new(Shared(Arc::clone(&words)), SIZE).unwrap();
        let mut consumer = Consumer::new(Shared(Arc::clone(&words)), SIZE).unwrap();
        consumer.mask();
        let writer = {
            let signal = Arc::clone(&signal);
            thread::spawn(move || {
                producer.reserve(8).unwrap().unwrap();
                if producer.commit().unwrap() {
                    signal.raise();
                }
            })
        };
        let seen = consumer.unmask().unwrap();
        writer.join().unwrap();
        assert!(
            seen || signal.raised(),
            "the reader sleeps with data in the ring and no signal"
        );
    });
}

#[test]
fn a_writer_that_waits_for_space_is_woken_or_sees_the_space() {
    loom::model(|| {
        let words = Arc::new(Words::default());
        let signal = Arc::new(Signal::default());
        let mut producer = Producer::new(Shared(Arc::clone(&words)), SIZE).unwrap();
        let mut consumer = Consumer::new(Shared(Arc::clone(&words)), SIZE).unwrap();
        producer.reserve(24).unwrap().unwrap();
        producer.commit().unwrap();
        assert_eq!(consumer.available().unwrap(), 24);
        let reader = {
            let signal = Arc::clone(&signal);
            thread::spawn(move || {
                consumer.advance(24);
                if consumer.commit().unwrap() {
                    signal.raise();
                }
            })
        };
        let written = producer.reserve(16).unwrap().is_some();
        reader.join().unwrap();
        assert!(
            written || signal.raised(),
            "the writer waits with space in the ring and no signal"
        );
    });
}

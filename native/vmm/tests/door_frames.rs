//! Whatever frames come, in whatever order and with whatever descriptors: the door answers or refuses, and never panics.

#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests")]

use std::fs::File;
use std::os::fd::OwnedFd;

use vswitch_vmm::door::{Door, Event};
use vswitch_wire::door::{DoorMessage, HEADER_SIZE};

/// xorshift64*: enough for bytes that need not be secret, the same on every run.
struct Bytes(u64);

impl Bytes {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }
}

fn descriptors(count: usize) -> Vec<OwnedFd> {
    (0..count)
        .map(|_| File::open("/dev/null").unwrap().into())
        .collect()
}

fn hello(flags: u32, vps: u32) -> Vec<u8> {
    let mut frame = vec![1, 0, 0, 0, 7, 0, 0, 0, 48, 0, 0, 0, 0, 0, 0, 0];
    for word in [
        1u64 << 16 | 1 | u64::from(flags) << 32,
        5,
        u64::from(vps) | 1 << 32,
        u64::MAX,
    ] {
        frame.extend(word.to_le_bytes());
    }
    for word in [0u64, 1 << 20] {
        frame.extend(word.to_le_bytes());
    }
    frame
}

fn deliver(vp: u32, sint: u32) -> Vec<u8> {
    let message = [1; 256];
    DoorMessage::Deliver {
        vp,
        sint,
        message: &message,
    }
    .encode(0)
    .unwrap()
}

fn greeted() -> Door {
    let mut door = Door::default();
    door.connected();
    let event = door.receive(&hello(0, 2), descriptors(3)).unwrap();
    let Event::Fresh {
        shape,
        memfds,
        interrupts,
        sequence,
    } = event
    else {
        panic!("{event:?}");
    };
    assert_eq!(
        (sequence, shape.vp_count, memfds.len(), interrupts.len()),
        (7, 2, 1, 2)
    );
    door
}

#[test]
fn random_frames_after_any_start() {
    let mut bytes = Bytes(0x5EED_0FD0_0B00_0001);
    let kinds: [u16; 24] = [
        0x01, 0x02, 0x10, 0x11, 0x12, 0x13, 0x14, 0x18, 0x1F, 0x20, 0x21, 0x22, 0x30, 0x31, 0x32,
        0x33, 0x34, 0x40, 0x42, 0x43, 0x45, 0x46, 0x7F, 0xFFFF,
    ];
    let mut understood = 0;
    for _ in 0..3000 {
        let mut door = if bytes.below(4) == 0 {
            Door::default()
        } else {
            greeted()
        };
        for _ in 0..20 {
            let length = [0, 4, 8, 16, 128, 264, 264, 48][bytes.below(8)] + bytes.below(3) / 2;
            let mut frame = vec![0u8; HEADER_SIZE];
            frame[..2].copy_from_slice(&kinds[bytes.below(kinds.len())].to_le_bytes());
            frame[8..12].copy_from_slice(&(length as u32).to_le_bytes());
            for _ in 0..length {
                let value = bytes.next();
                frame.push(if value & 0x300 == 0 {
                    value as u8
                } else {
                    value as u8 & 1
                });
            }
            if bytes.below(16) == 0 {
                frame.truncate(bytes.below(frame.len() + 1));
            }
            let count = [0, 0, 0, 1, 2, 3][bytes.below(6)];
            match door.receive(&frame, descriptors(count)) {
                Ok(_) => understood += 1,
                Err(refusal) => {
                    assert!(!refusal.text.is_empty());
                    door.connected();
                    // The next conversation of a machine that runs begins well.
                    let _ = door.receive(&hello(1, 2), descriptors(2));
                }
            }
        }
    }
    assert!(understood > 1000, "only {understood} frames were good ones");
}

#[test]
fn a_slot_has_one_message_at_a_time() {
    let mut door = greeted();
    assert!(matches!(
        door.receive(&deliver(1, 2), vec![]),
        Ok(Event::Deliver { vp: 1, sint: 2, .. })
    ));
    assert!(door.receive(&deliver(1, 3), vec![]).is_ok());
    assert_eq!(door.receive(&deliver(1, 2), vec![]).unwrap_err().code, 4);
    assert!(door.end_of_message(1, 2));
    assert!(!door.end_of_message(1, 2), "one EOM for each DELIVER");
    assert!(door.receive(&deliver(1, 2), vec![]).is_ok());
    assert_eq!(
        door.receive(&deliver(2, 2), vec![]).unwrap_err().code,
        1,
        "there are 2 processors"
    );
}

#[test]
fn resume_is_for_the_partition_that_runs_here() {
    let mut door = greeted();
    assert_eq!(
        door.receive(&hello(1, 2), descriptors(2)).unwrap_err().code,
        4,
        "HELLO twice"
    );
    door.connected();
    let early = DoorMessage::Park.encode(1).unwrap();
    assert_eq!(door.receive(&early, vec![]).unwrap_err().code, 4);
    assert_eq!(
        door.receive(&hello(1, 3), descriptors(3)).unwrap_err().code,
        5,
        "another shape"
    );
    assert_eq!(
        door.receive(&hello(0, 2), descriptors(3)).unwrap_err().code,
        4,
        "it runs already"
    );
    assert!(matches!(
        door.receive(&hello(1, 2), descriptors(2)),
        Ok(Event::Resumed { .. })
    ));
    let nobody = Door::default().receive(&hello(1, 2), descriptors(2));
    assert_eq!(nobody.unwrap_err().code, 5, "nothing runs here");
}

#[test]
fn an_agents_frames_are_answered_that_there_is_none() {
    let mut door = greeted();
    let configure = DoorMessage::Configure { document: b"{}" }
        .encode(9)
        .unwrap();
    let Ok(Event::Reply(frame)) = door.receive(&configure, vec![]) else {
        panic!("no answer to CONFIGURE");
    };
    let (sequence, message) = DoorMessage::parse(&frame).unwrap();
    assert!(matches!(
        (sequence, message),
        (9, DoorMessage::Configured { status: 95, .. })
    ));
    let exec = DoorMessage::Exec { document: b"{}" }.encode(10).unwrap();
    let Ok(Event::Reply(frame)) = door.receive(&exec, descriptors(3)) else {
        panic!("no answer to EXEC");
    };
    let (_, message) = DoorMessage::parse(&frame).unwrap();
    assert!(matches!(
        message,
        DoorMessage::ExecStarted {
            status: 95,
            pid: 0,
            ..
        }
    ));
}

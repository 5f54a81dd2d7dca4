//! The ring over real guest memory: scattered pages, many wraps, a writer and a reader on two threads.
#![cfg(not(loom))]
// A test that cannot make its memory has failed.
#![allow(clippy::expect_used)]

use std::os::fd::{FromRawFd, OwnedFd};

use vswitch_memory::{BufferView, GuestMemory, Region};
use vswitch_ring::{RingReader, RingWriter};
use vswitch_wire::packet::{TransferRange, VM_PKT_DATA_USING_XFER_PAGES};

/// A ring of `pages` pages in reverse order, so that no two of them are one run.
fn ring(pages: u64) -> BufferView {
    let size = pages * 4096;
    // SAFETY: plain system calls on an fd made here; results are checked.
    let fd = unsafe {
        let fd = libc::memfd_create(c"ring".as_ptr(), libc::MFD_ALLOW_SEALING);
        assert!(fd >= 0 && libc::ftruncate(fd, size as libc::off_t) == 0);
        assert!(libc::fcntl(fd, libc::F_ADD_SEALS, libc::F_SEAL_SHRINK) == 0);
        fd
    };
    // SAFETY: made above and owned by nobody else; the mapping does not need it.
    let _closed = unsafe { OwnedFd::from_raw_fd(fd) };
    let memory = GuestMemory::new(&[Region { gpa: 0, size, fd }]).expect("memory");
    let pfns: Vec<u64> = (0..pages).rev().collect();
    memory.view(&pfns, 0, size as usize).expect("view")
}

#[test]
fn two_threads_pass_every_packet_in_order_with_no_lost_wake_up() {
    const PACKETS: u64 = 20_000;
    let view = ring(3);
    let mut writer = RingWriter::new(view.clone()).expect("writer");
    let mut reader = RingReader::new(view).expect("reader");
    let thread = std::thread::spawn(move || {
        for number in 0..PACKETS {
            let payload = number.to_le_bytes().repeat(1 + number as usize % 60);
            while !writer
                .write_inband(&payload, number, number % 2 == 0)
                .expect("write")
            {
                writer.commit().expect("commit");
                std::thread::yield_now();
            }
            if number % 7 == 0 {
                writer.commit().expect("commit");
            }
        }
        writer.commit().expect("commit");
    });
    let mut scratch = Vec::new();
    let mut expected = 0;
    while expected < PACKETS {
        while let Some(packet) = reader.next(&mut scratch).expect("read") {
            assert_eq!(packet.transaction_id(), expected);
            assert_eq!(packet.completion_requested(), expected % 2 == 0);
            assert_eq!(
                packet.payload,
                expected.to_le_bytes().repeat(1 + expected as usize % 60)
            );
            expected += 1;
        }
        reader.commit().expect("commit");
    }
    thread.join().expect("writer thread");
    assert!(!reader.pending().expect("pending"));
}

#[test]
fn transfer_page_packets_keep_their_ranges() {
    let view = ring(2);
    let mut writer = RingWriter::new(view.clone()).expect("writer");
    let mut reader = RingReader::new(view).expect("reader");
    let ranges: Vec<TransferRange> = (0..40)
        .map(|index| TransferRange {
            byte_count: 60 + index,
            byte_offset: index * 1806,
        })
        .collect();
    assert!(writer
        .write_transfer_pages(3, 0xCAFE, &ranges, &[7; 40], true)
        .expect("write"));
    assert!(writer.commit().expect("commit"));
    let mut scratch = Vec::new();
    let packet = reader.next(&mut scratch).expect("read").expect("a packet");
    assert_eq!(packet.kind(), VM_PKT_DATA_USING_XFER_PAGES);
    let (set_id, read) = packet.transfer_ranges().expect("ranges");
    assert_eq!((set_id, read.collect::<Vec<_>>()), (0xCAFE, ranges));
    assert_eq!(packet.payload, [7; 40]);
}

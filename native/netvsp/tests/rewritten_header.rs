//! A guest that rewrites a header between verdict and delivery: the judged header is what arrives.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::ffi::CString;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use vswitch_memory::{GuestMemory, Interrupt, Region};
use vswitch_netvsp::channel::Pages;
use vswitch_netvsp::{Channel, ChannelEndpoint};
use vswitch_ring::{RingReader, RingWriter};
use vswitch_switch::endpoint::{Batch, Endpoint};
use vswitch_wire::packet::GpaRangeRef;

const PAGE: usize = 4096;
const SIZE: usize = 1 << 20;
const RING: u64 = 4;
const RECEIVE: u64 = 32;
const RECEIVE_PAGES: u64 = 64;
const SCRATCH: u64 = 128;

struct Guest {
    memory: Arc<GuestMemory>,
    endpoint: ChannelEndpoint,
    _channel: Channel,
    _fds: Vec<OwnedFd>,
}

fn memfd() -> OwnedFd {
    let name = CString::new("guest").unwrap();
    // SAFETY: a valid name; the result is checked.
    let fd =
        unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) };
    assert!(fd >= 0);
    // SAFETY: the fd was made just now and nobody else has it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: plain values on an open fd.
    unsafe {
        assert_eq!(libc::ftruncate(fd.as_raw_fd(), SIZE as i64), 0);
        assert_eq!(
            libc::fcntl(fd.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_SHRINK),
            0
        );
    }
    fd
}

fn eventfd() -> OwnedFd {
    let fd = vswitch_memory::eventfd::create().unwrap();
    // SAFETY: the fd was made just now and nobody else has it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn pages(pfns: &[u64]) -> Pages<'_> {
    Pages {
        pfns,
        byte_offset: 0,
        byte_count: pfns.len() * PAGE,
    }
}

fn guest() -> Guest {
    let (backing, doorbell, irq) = (memfd(), eventfd(), eventfd());
    let region = Region {
        gpa: 0,
        size: SIZE as u64,
        fd: backing.as_raw_fd(),
    };
    let memory = Arc::new(GuestMemory::new(&[region]).unwrap());
    let interrupt = Arc::new(Interrupt::new(Arc::clone(&memory), irq.as_raw_fd()).unwrap());
    let rings: Vec<u64> = (1..1 + 2 * RING).collect();
    let channel = Channel::open(
        Arc::clone(&memory),
        &rings,
        RING as usize,
        doorbell.as_raw_fd(),
        interrupt,
    )
    .unwrap();
    let receive: Vec<u64> = (RECEIVE..RECEIVE + RECEIVE_PAGES).collect();
    channel
        .set_receive_buffer(pages(&receive), 0xCAFE, 1856, 100)
        .unwrap();
    channel.set_data(true);
    channel.set_filter(0x20, [2, 0, 0, 0, 0, 2]);
    let endpoint = channel.endpoint().unwrap();
    Guest {
        memory,
        endpoint,
        _channel: channel,
        _fds: vec![backing, doorbell, irq],
    }
}

impl Guest {
    /// What the guest writes and reads.
    fn rings(&self) -> (RingWriter, RingReader) {
        let view = |first: u64| {
            let pfns: Vec<u64> = (first..first + RING).collect();
            self.memory.view(&pfns, 0, RING as usize * PAGE).unwrap()
        };
        (
            RingWriter::new(view(1)).unwrap(),
            RingReader::new(view(1 + RING)).unwrap(),
        )
    }

    /// Sends `frame` by GPA ranges out of the scratch pages.
    fn send(&self, writer: &mut RingWriter, frame: &[u8]) {
        let mut message = vswitch_wire::rndis::packet_header(0, frame.len()).to_vec();
        message.extend_from_slice(frame);
        self.memory.write(SCRATCH << 12, &message).unwrap();
        let mut nvsp = [0u8; 32];
        nvsp[0] = 107;
        nvsp[8..12].fill(0xFF);
        let range = GpaRangeRef {
            byte_count: message.len() as u32,
            byte_offset: 0,
            pfns: &[SCRATCH],
        };
        assert!(writer.write_gpa_direct(7, &[range], &nvsp, true).unwrap());
        writer.commit().unwrap();
    }
}

#[test]
fn a_header_rewritten_between_verdict_and_delivery_is_not_delivered() {
    for length in [60, 192, 193, 320, 1514] {
        let (mut sender, mut receiver) = (guest(), guest());
        let (mut writer, _) = sender.rings();
        let (_, mut inbox) = receiver.rings();
        // The receiver's commands run on its first turn.
        receiver.endpoint.receive(&mut Batch::new());

        let frame: Vec<u8> = (0..length).map(|byte| byte as u8).collect();
        sender.send(&mut writer, &frame);
        let mut batch = Batch::new();
        sender.endpoint.receive(&mut batch);
        assert_eq!(batch.len(), 1, "verdicts are given on this batch");

        sender.memory.write(SCRATCH << 12, &[0xEE; PAGE]).unwrap();
        let judged = batch.frame(0).unwrap();
        assert_eq!(judged.len(), length);
        receiver.endpoint.transmit(&judged).unwrap();
        receiver.endpoint.flush();

        let mut scratch = Vec::new();
        let packet = inbox.next(&mut scratch).unwrap().unwrap();
        let (_, mut ranges) = packet.transfer_ranges().unwrap();
        let range = ranges.next().unwrap();
        let mut delivered = vec![0; range.byte_count as usize - 44];
        let at = (RECEIVE << 12) + u64::from(range.byte_offset) + 44;
        receiver.memory.read(at, &mut delivered).unwrap();
        assert_eq!(delivered.len(), length);
        let head = length.min(192);
        assert_eq!(delivered[..head], frame[..head], "frame of {length} bytes");
    }
}

#[test]
fn the_senders_completion_waits_for_the_flush_behind_delivery() {
    let mut sender = guest();
    let (mut writer, mut inbox) = sender.rings();
    sender.send(&mut writer, &[5; 1000]);
    let mut batch = Batch::new();
    sender.endpoint.receive(&mut batch);
    let mut scratch = Vec::new();
    assert!(inbox.next(&mut scratch).unwrap().is_none());
    sender.endpoint.flush();
    let completion = inbox.next(&mut scratch).unwrap().unwrap();
    assert_eq!((completion.kind(), completion.transaction_id()), (0xB, 7));
    assert_eq!(completion.payload[..8], [108, 0, 0, 0, 1, 0, 0, 0]);
}

/// What the switch does with an endpoint whose code panicked, as the channel's owner sees it.
#[test]
fn a_panic_is_told_and_ends_the_wait_for_queues() {
    let mut guest = guest();
    let channel = guest._channel;
    channel.close_queue(3);
    guest.endpoint.failed("index out of bounds");
    let fault = channel.shared().fault().unwrap();
    assert!(fault.contains("index out of bounds"), "{fault}");
    assert!(channel.shared().stats().contains(&("host_failures", 1)));
    drop(guest.endpoint);
    channel.close_queue(4);
    let closed: Vec<_> = channel
        .shared()
        .take_control()
        .into_iter()
        .map(|packet| (packet.kind.name(), packet.transaction_id))
        .collect();
    assert_eq!(closed, [("closed", 3), ("closed", 4)]);
}

//! One open channel: interface frames to the ring and back; the twin of `netvsc/datapath.py`.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use vswitch_memory::{eventfd, BufferView};
use vswitch_ring::{RingError, RingReader, RingWriter};
use vswitch_wire::packet::{self, GpaRangeRef};

use crate::frames::{self, HEADROOM, VNET_SIZE};
use crate::link::Link;

mod receive;

pub const BOUNCE_PAGES: usize = 17;
const PAGE: usize = 4096;
const NO_SECTION: u32 = 0xFFFF_FFFF;
const CHANNEL_DATA: u32 = 0;
const CHANNEL_CONTROL: u32 = 1;
const SEND_RNDIS_PKT: u32 = 107;
const SEND_RNDIS_PKT_COMPLETE: u32 = 108;
const STATUS_SUCCESS: u32 = 1;
const STATUS_FAILURE: u32 = 2;
const RNDIS_PACKET_MSG: u32 = 1;

const ID_SECTION: u64 = 1 << 32;
const ID_BOUNCE: u64 = 2 << 32;
const ID_CONTROL: u64 = 3 << 32;
const CONTROL_SECTION: usize = 0;
const TURN: usize = 256;
const LARGEST_FRAME: usize = 65536 + VNET_SIZE + 4;
/// Control messages that the driver has not taken; a host that sends more loses the channel.
const CONTROL_LIMIT: usize = 1024;
/// Packets that wait for space in the upstream ring before the downstream one is read no more.
const BACKLOG_LIMIT: usize = 4096;

/// Names of the counters, in order.
pub const COUNTERS: [&str; 10] = [
    "tx_packets",
    "tx_bytes",
    "tx_messages",
    "tx_errors",
    "tx_stopped",
    "rx_packets",
    "rx_bytes",
    "rx_dropped",
    "rx_errors",
    "stray_completions",
];

#[derive(Clone, Copy)]
enum Count {
    TxPackets,
    TxBytes,
    TxMessages,
    TxErrors,
    TxStopped,
    RxPackets,
    RxBytes,
    RxDropped,
    RxErrors,
    StrayCompletions,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Inband,
    Completion,
    Rndis,
    Fault,
}

/// What the data path hands to the driver.
#[derive(Debug)]
pub struct Control {
    pub kind: Kind,
    pub transaction_id: u64,
    pub completion_requested: bool,
    pub payload: Vec<u8>,
}

/// What the driver's thread and the worker share.
pub struct Shared {
    control: Mutex<VecDeque<Control>>,
    control_fd: OwnedFd,
    counters: [AtomicU64; COUNTERS.len()],
    /// Sections and bounce buffers that the host has not completed.
    sending: AtomicU64,
    /// RNDIS control messages handed over and not completed.
    requests: AtomicU64,
}

impl Shared {
    pub fn new(control_fd: OwnedFd) -> Self {
        Self {
            control: Mutex::new(VecDeque::new()),
            control_fd,
            counters: Default::default(),
            sending: AtomicU64::new(0),
            requests: AtomicU64::new(0),
        }
    }

    pub fn control_fd(&self) -> RawFd {
        self.control_fd.as_raw_fd()
    }

    /// Everything that waits, oldest first; clears the eventfd.
    pub fn take_control(&self) -> Vec<Control> {
        eventfd::drain(self.control_fd());
        let mut queue = self.control.lock().unwrap_or_else(PoisonError::into_inner);
        queue.drain(..).collect()
    }

    /// False when the queue is full.
    fn tell(&self, item: Control) -> bool {
        let mut queue = self.control.lock().unwrap_or_else(PoisonError::into_inner);
        let room = queue.len() < CONTROL_LIMIT || item.kind == Kind::Fault;
        if room {
            queue.push_back(item);
        }
        drop(queue);
        eventfd::signal(self.control_fd());
        room
    }

    /// A control message is on its way to the worker.
    pub fn expect_rndis(&self) {
        self.requests.fetch_add(1, Ordering::AcqRel);
    }

    /// Sends of any kind that the host has not completed.
    pub fn in_flight(&self) -> u64 {
        self.sending.load(Ordering::Acquire) + self.requests.load(Ordering::Acquire)
    }

    pub fn counters(&self) -> [u64; COUNTERS.len()] {
        std::array::from_fn(|index| self.counters[index].load(Ordering::Relaxed))
    }
}

struct Bounce {
    view: BufferView,
    pfns: Vec<u64>,
}

/// A section that is being filled.
struct Batch {
    section: usize,
    filled: usize,
    count: usize,
    last: usize,
}

pub struct Path {
    reader: RingReader,
    writer: RingWriter,
    signal_fd: OwnedFd,
    link: Link,
    shared: Arc<Shared>,
    counts: [u64; COUNTERS.len()],
    backlog: VecDeque<Vec<u8>>,
    dead: bool,
    running: bool,
    link_ready: bool,
    checksum: bool,
    mtu: usize,
    receive_view: Option<BufferView>,
    set_id: u16,
    receive_size: u64,
    send_view: Option<BufferView>,
    section_size: usize,
    free_sections: Vec<usize>,
    busy_sections: Vec<bool>,
    bounces: Vec<Bounce>,
    free_bounces: Vec<usize>,
    busy_bounces: Vec<bool>,
    per_message: usize,
    alignment: usize,
    rndis: VecDeque<Vec<u8>>,
    rndis_busy: bool,
    packet: Vec<u8>,
    frame: Vec<u8>,
    message: Vec<u8>,
    assembly: Vec<u8>,
}

fn send_rndis_packet(channel: u32, section: u32, size: u32) -> [u8; 16] {
    let mut body = [0; 16];
    for (place, value) in body
        .chunks_exact_mut(4)
        .zip([SEND_RNDIS_PKT, channel, section, size])
    {
        place.copy_from_slice(&value.to_le_bytes());
    }
    body
}

fn word(data: &[u8], at: usize) -> u32 {
    match data.get(at..at + 4) {
        Some(&[a, b, c, d]) => u32::from_le_bytes([a, b, c, d]),
        _ => 0,
    }
}

impl Path {
    pub fn new(
        upstream: BufferView,
        downstream: BufferView,
        signal_fd: OwnedFd,
        link: Link,
        shared: Arc<Shared>,
    ) -> Result<Self, RingError> {
        Ok(Self {
            reader: RingReader::new(downstream)?,
            writer: RingWriter::new(upstream)?,
            signal_fd,
            link,
            shared,
            counts: [0; COUNTERS.len()],
            backlog: VecDeque::new(),
            dead: false,
            running: false,
            link_ready: true,
            checksum: false,
            mtu: 1500,
            receive_view: None,
            set_id: 0,
            receive_size: 0,
            send_view: None,
            section_size: 0,
            free_sections: Vec::new(),
            busy_sections: Vec::new(),
            bounces: Vec::new(),
            free_bounces: Vec::new(),
            busy_bounces: Vec::new(),
            per_message: 1,
            alignment: 8,
            rndis: VecDeque::new(),
            rndis_busy: false,
            packet: Vec::with_capacity(PAGE),
            frame: vec![0; HEADROOM + LARGEST_FRAME],
            message: Vec::with_capacity(PAGE),
            assembly: Vec::with_capacity(LARGEST_FRAME),
        })
    }

    pub fn link_fd(&self) -> RawFd {
        self.link.raw()
    }

    pub fn set_receive_buffer(&mut self, view: BufferView, set_id: u16, size: u64) {
        self.receive_view = Some(view);
        self.set_id = set_id;
        self.receive_size = size;
    }

    /// `bounces` are views of whole pages with their page numbers.
    pub fn set_send_buffer(
        &mut self,
        view: BufferView,
        section_size: usize,
        bounces: Vec<(BufferView, Vec<u64>)>,
    ) {
        let sections = view.len() / section_size.max(1);
        self.send_view = Some(view);
        self.section_size = section_size;
        self.free_sections = (CONTROL_SECTION + 1..sections).rev().collect();
        self.busy_sections = vec![false; sections];
        self.bounces = bounces
            .into_iter()
            .map(|(view, pfns)| Bounce { view, pfns })
            .collect();
        self.free_bounces = (0..self.bounces.len()).collect();
        self.busy_bounces = vec![false; self.bounces.len()];
    }

    pub fn set_aggregation(&mut self, messages: usize, alignment: usize) {
        self.per_message = messages.max(1);
        self.alignment = alignment.max(1);
    }

    pub fn set_offload(&mut self, checksum: bool, mtu: usize) {
        self.checksum = checksum;
        self.mtu = mtu;
    }

    pub fn set_running(&mut self, running: bool) {
        self.running = running;
        self.link_ready = true;
    }

    pub fn link_is_ready(&mut self) {
        self.link_ready = true;
    }

    pub fn send_inband(&mut self, payload: &[u8], transaction_id: u64, completion: bool) {
        self.attempt(|path| path.put_inband(payload, transaction_id, completion));
    }

    pub fn send_completion(&mut self, transaction_id: u64, payload: &[u8]) {
        self.attempt(|path| path.put_completion(transaction_id, payload));
    }

    pub fn send_rndis(&mut self, message: Vec<u8>) {
        self.rndis.push_back(message);
        self.attempt(Self::next_rndis);
    }

    /// Does what is due; true = there is more to do at once.
    pub fn turn(&mut self, interrupted: bool) -> bool {
        if self.dead {
            return false;
        }
        let mut more = false;
        self.attempt(|path| {
            if interrupted {
                // First: a full backlog stops the reading, and the host announces space only once.
                path.drain_backlog()?;
                more = path.receive()?;
                path.next_rndis()?;
            }
            Ok(())
        });
        if self.running && self.link_ready && !self.dead {
            self.attempt(Self::transmit);
            more |= self.running && self.link_ready && self.may_transmit();
        }
        more && !self.dead
    }

    /// Does `act` and publishes it; an error is the host's fault and ends the path.
    fn attempt(&mut self, act: impl FnOnce(&mut Self) -> Result<(), RingError>) {
        if self.dead {
            return;
        }
        let done = act(self);
        // Before the host sees what was done: who is told of an event finds it counted.
        self.publish_counters();
        let done = done.and_then(|()| self.publish());
        if let Err(error) = done {
            self.fault(&error.to_string());
        }
    }

    pub(crate) fn fault(&mut self, text: &str) {
        self.dead = true;
        self.running = false;
        self.shared.tell(Control {
            kind: Kind::Fault,
            transaction_id: 0,
            completion_requested: false,
            payload: text.as_bytes().to_vec(),
        });
    }

    fn count(&mut self, what: Count, by: u64) {
        self.counts[what as usize] += by;
    }

    fn publish_counters(&self) {
        for (shared, value) in self.shared.counters.iter().zip(self.counts) {
            shared.store(value, Ordering::Relaxed);
        }
        let busy = |flags: &[bool]| flags.iter().filter(|busy| **busy).count() as u64;
        let sending = busy(&self.busy_sections) + busy(&self.busy_bounces);
        self.shared.sending.store(sending, Ordering::Release);
    }

    // The upstream ring.

    fn put_inband(&mut self, payload: &[u8], id: u64, completion: bool) -> Result<(), RingError> {
        if !self.backlog.is_empty() || !self.writer.write_inband(payload, id, completion)? {
            let mut data = Vec::new();
            packet::encode_inband(&mut data, payload, id, completion)?;
            self.backlog.push_back(data);
        }
        Ok(())
    }

    fn put_completion(&mut self, id: u64, payload: &[u8]) -> Result<(), RingError> {
        if !self.backlog.is_empty() || !self.writer.write_completion(id, payload)? {
            let mut data = Vec::new();
            packet::encode_completion(&mut data, id, payload)?;
            self.backlog.push_back(data);
        }
        Ok(())
    }

    fn drain_backlog(&mut self) -> Result<(), RingError> {
        while let Some(data) = self.backlog.front() {
            if !self.writer.write(data)? {
                break;
            }
            self.backlog.pop_front();
        }
        Ok(())
    }

    fn publish(&mut self) -> Result<(), RingError> {
        if self.writer.commit()? {
            eventfd::signal(self.signal_fd.as_raw_fd());
        }
        Ok(())
    }

    fn next_rndis(&mut self) -> Result<(), RingError> {
        if self.rndis_busy {
            return Ok(());
        }
        let Some(view) = self.send_view.clone() else {
            return Ok(());
        };
        let Some(message) = self.rndis.pop_front() else {
            return Ok(());
        };
        self.rndis_busy = true;
        view.write(CONTROL_SECTION * self.section_size, &message)?;
        let body = send_rndis_packet(
            CHANNEL_CONTROL,
            CONTROL_SECTION as u32,
            message.len() as u32,
        );
        self.put_inband(&body, ID_CONTROL, true)
    }

    // Transmit.

    fn may_transmit(&self) -> bool {
        !self.free_sections.is_empty() && !self.free_bounces.is_empty() && self.backlog.is_empty()
    }

    fn transmit(&mut self) -> Result<(), RingError> {
        let mut buffer = std::mem::take(&mut self.frame);
        let done = self.transmit_from(&mut buffer);
        self.frame = buffer;
        done
    }

    fn transmit_from(&mut self, buffer: &mut [u8]) -> Result<(), RingError> {
        let Some(view) = self.send_view.clone() else {
            return Ok(());
        };
        let mut open: Option<Batch> = None;
        for _ in 0..TURN {
            // A free section for a frame that no longer fits into the open one, or it stays with the kernel.
            if !self.may_transmit() {
                self.count(Count::TxStopped, 1);
                break;
            }
            let Some(place) = buffer.get_mut(HEADROOM..) else {
                break;
            };
            let Some(frame) = self.link.read(place) else {
                self.link_ready = false;
                break;
            };
            let made = frames::transmit(buffer, frame.length, frame.vlan, self.checksum);
            let end = HEADROOM + frame.length;
            let Some(message) = made.ok().and_then(|begin| buffer.get(begin..end)) else {
                self.count(Count::TxErrors, 1);
                continue;
            };
            self.count(Count::TxPackets, 1);
            self.count(Count::TxBytes, (frame.length - VNET_SIZE) as u64);
            if message.len() > self.section_size {
                self.send_section(open.take())?;
                self.send_bounce(message)?;
                continue;
            }
            if let Some(batch) = &open {
                let padded = batch.filled.next_multiple_of(self.alignment);
                if batch.count >= self.per_message || padded + message.len() > self.section_size {
                    self.send_section(open.take())?;
                }
            }
            match &mut open {
                Some(batch) => self.append(&view, batch, message)?,
                None => {
                    let Some(section) = self.free_sections.pop() else {
                        break;
                    };
                    view.write(section * self.section_size, message)?;
                    open = Some(Batch {
                        section,
                        filled: message.len(),
                        count: 1,
                        last: 0,
                    });
                }
            }
        }
        self.send_section(open.take())
    }

    /// Puts a message behind the others of a section; the one before it grows to the alignment.
    fn append(
        &self,
        view: &BufferView,
        batch: &mut Batch,
        message: &[u8],
    ) -> Result<(), RingError> {
        let base = batch.section * self.section_size;
        let padded = batch.filled.next_multiple_of(self.alignment);
        if padded != batch.filled {
            let zeros = vec![0; padded - batch.filled];
            view.write(base + batch.filled, &zeros)?;
            let length = (padded - batch.last) as u32;
            view.write(base + batch.last + 4, &length.to_le_bytes())?;
        }
        view.write(base + padded, message)?;
        batch.last = padded;
        batch.filled = padded + message.len();
        batch.count += 1;
        Ok(())
    }

    fn send_section(&mut self, batch: Option<Batch>) -> Result<(), RingError> {
        let Some(batch) = batch else { return Ok(()) };
        if let Some(busy) = self.busy_sections.get_mut(batch.section) {
            *busy = true;
        }
        self.count(Count::TxMessages, 1);
        let body = send_rndis_packet(CHANNEL_DATA, batch.section as u32, batch.filled as u32);
        self.put_inband(&body, ID_SECTION | batch.section as u64, true)
    }

    fn send_bounce(&mut self, message: &[u8]) -> Result<(), RingError> {
        let pages = message.len().div_ceil(PAGE);
        let Some(index) = self.free_bounces.pop() else {
            self.count(Count::TxErrors, 1);
            return Ok(());
        };
        let (Some(bounce), Some(busy)) =
            (self.bounces.get(index), self.busy_bounces.get_mut(index))
        else {
            return Ok(());
        };
        let Some(pfns) = bounce.pfns.get(..pages) else {
            self.free_bounces.push(index);
            self.count(Count::TxErrors, 1);
            return Ok(());
        };
        bounce.view.write(0, message)?;
        *busy = true;
        let body = send_rndis_packet(CHANNEL_DATA, NO_SECTION, 0);
        let range = [GpaRangeRef {
            byte_count: message.len() as u32,
            byte_offset: 0,
            pfns,
        }];
        let id = ID_BOUNCE | index as u64;
        if !self.backlog.is_empty() || !self.writer.write_gpa_direct(id, &range, &body, true)? {
            let mut data = Vec::new();
            packet::encode_gpa_direct(&mut data, id, &range, &body, true)?;
            self.backlog.push_back(data);
        }
        self.count(Count::TxMessages, 1);
        Ok(())
    }
}

/// Moves `index` from busy to free; false when it was not busy.
fn take(busy: &mut [bool], index: usize, free: &mut Vec<usize>) -> bool {
    match busy.get_mut(index) {
        Some(flag) if *flag => {
            *flag = false;
            free.push(index);
            true
        }
        _ => false,
    }
}

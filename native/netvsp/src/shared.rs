//! What the control half and the worker's half of a channel share.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use vswitch_memory::{eventfd, BufferView};
use vswitch_switch::drops::DropReason;

use crate::fd;
use crate::limits::{MAX_CONTROL_QUEUED, MAX_QUEUES, TAP_BYTES, TAP_PACKETS};
use crate::queue::Rings;
use crate::rss::Rss;

/// What the control plane tells the worker; done in order.
pub(crate) enum Command {
    Inband {
        payload: Vec<u8>,
        transaction_id: u64,
        completion: bool,
    },
    Complete {
        transaction_id: u64,
        payload: Vec<u8>,
    },
    Rndis(Vec<u8>),
    ReceiveBuffer {
        view: BufferView,
        id: u16,
        size: usize,
        count: usize,
    },
    SendBuffer {
        view: BufferView,
        section_size: usize,
    },
    RevokeReceiveBuffer,
    RevokeSendBuffer,
    Data(bool),
    Link(bool),
    Filter {
        bits: u32,
        address: [u8; 6],
    },
    Offload(u32),
    Mtu(usize),
    Rss(Option<Box<Rss>>),
    OpenQueue(Box<Rings>),
    CloseQueue(usize),
}

/// Kinds of what the worker hands up; the names are those of the Python twin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ControlKind {
    Inband,
    Completion,
    Rndis,
    Revoked,
    Closed,
}

impl ControlKind {
    pub fn name(self) -> &'static str {
        match self {
            ControlKind::Inband => "inband",
            ControlKind::Completion => "completion",
            ControlKind::Rndis => "rndis",
            ControlKind::Revoked => "revoked",
            ControlKind::Closed => "closed",
        }
    }
}

/// One control message from the guest, whole and checked.
#[derive(Debug)]
pub struct ControlPacket {
    pub kind: ControlKind,
    pub transaction_id: u64,
    pub completion_requested: bool,
    pub payload: Vec<u8>,
}

/// A ring packet seen by the tap.
pub struct Tapped {
    pub timestamp_ns: u64,
    pub from_guest: bool,
    pub packet: Vec<u8>,
}

/// What the tap saw and nobody has asked for yet.
#[derive(Default)]
struct Tape {
    packets: VecDeque<Tapped>,
    bytes: usize,
}

impl Tape {
    fn push(&mut self, tapped: Tapped) {
        self.bytes += tapped.packet.len();
        self.packets.push_back(tapped);
        while self.packets.len() > TAP_PACKETS || self.bytes > TAP_BYTES {
            let Some(oldest) = self.packets.pop_front() else {
                break;
            };
            self.bytes -= oldest.packet.len();
        }
    }
}

macro_rules! counters {
    ($kind:ident: $($name:ident),+ $(,)?) => {
        /// Counters since the channel was opened; the worker alone writes them.
        #[derive(Default)]
        pub(crate) struct $kind { $(pub(crate) $name: Counter,)+ }

        impl $kind {
            fn list(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name.get()),)+]
            }
        }
    };
}

counters!(
    QueueCounters: frames_from_guest,
    bytes_from_guest,
    frames_to_guest,
    bytes_to_guest,
    signals,
);

counters!(
    Counters: malformed,
    receive_failures,
    control_dropped,
    checksums_passed_on,
    checksums_completed,
    large_sends_segmented,
    large_sends_coalesced,
    host_failures,
);

/// A counter with one writer: a load and a store, no locked instruction.
#[derive(Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self, count: u64) {
        self.0.store(
            self.0.load(Ordering::Relaxed).wrapping_add(count),
            Ordering::Relaxed,
        );
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Reasons for which a channel drops frames.
const REASONS: [DropReason; 7] = [
    DropReason::InvalidPacket,
    DropReason::Resources,
    DropReason::NotReady,
    DropReason::Disconnected,
    DropReason::MtuMismatch,
    DropReason::FailedPacketFilter,
    DropReason::VmbusError,
];

/// A lock that a panic elsewhere does not close: its data is valid between any two operations.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The state both halves see.
pub struct Shared {
    /// None = the worker's half is gone: nobody does what is asked.
    commands: Mutex<Option<VecDeque<Command>>>,
    has_commands: AtomicBool,
    control: Mutex<VecDeque<ControlPacket>>,
    fault: Mutex<Option<String>>,
    tap: AtomicBool,
    tapped: Mutex<Tape>,
    pub(crate) counters: Counters,
    queues: [QueueCounters; MAX_QUEUES],
    /// Queues below this were open at some time.
    queues_seen: AtomicUsize,
    drops: [Counter; REASONS.len()],
    doorbell: OwnedFd,
    control_fd: OwnedFd,
}

impl Shared {
    /// `doorbell`, the eventfd that the guest signals, is duplicated.
    pub(crate) fn new(doorbell: RawFd) -> io::Result<Self> {
        Ok(Shared {
            commands: Mutex::new(Some(VecDeque::new())),
            has_commands: AtomicBool::new(false),
            control: Mutex::default(),
            fault: Mutex::default(),
            tap: AtomicBool::new(false),
            tapped: Mutex::default(),
            counters: Counters::default(),
            queues: std::array::from_fn(|_| QueueCounters::default()),
            queues_seen: AtomicUsize::new(1),
            drops: Default::default(),
            doorbell: fd::duplicate(doorbell)?,
            control_fd: fd::eventfd()?,
        })
    }

    pub(crate) fn wake_fd(&self) -> RawFd {
        self.doorbell.as_raw_fd()
    }

    /// Readable while control messages or a fault wait.
    pub fn control_fd(&self) -> RawFd {
        self.control_fd.as_raw_fd()
    }

    pub(crate) fn command(&self, command: Command) {
        match &mut *lock(&self.commands) {
            Some(commands) => commands.push_back(command),
            None => return self.answer_for_the_gone(&command),
        }
        self.has_commands.store(true, Ordering::Release);
        eventfd::signal_shared(self.doorbell.as_raw_fd());
    }

    /// The worker's half has let go of all guest memory and ends: who waits for a queue need wait no longer.
    pub(crate) fn worker_gone(&self) {
        let commands = lock(&self.commands).take();
        for command in commands.into_iter().flatten() {
            self.answer_for_the_gone(&command);
        }
    }

    fn answer_for_the_gone(&self, command: &Command) {
        if let Command::CloseQueue(index) = command {
            self.closed(*index);
        }
    }

    /// Tells the control plane that the queue's rings are out of use.
    pub(crate) fn closed(&self, index: usize) {
        self.push_control(ControlPacket {
            kind: ControlKind::Closed,
            transaction_id: index as u64,
            completion_requested: false,
            payload: Vec::new(),
        });
    }

    pub(crate) fn has_commands(&self) -> bool {
        self.has_commands.load(Ordering::Acquire)
    }

    pub(crate) fn take_commands(&self) -> VecDeque<Command> {
        let mut commands = lock(&self.commands);
        self.has_commands.store(false, Ordering::Release);
        commands.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// Whether the queue has room for another message from the guest.
    pub(crate) fn control_has_room(&self) -> bool {
        lock(&self.control).len() < MAX_CONTROL_QUEUED
    }

    pub(crate) fn push_control(&self, packet: ControlPacket) {
        lock(&self.control).push_back(packet);
        eventfd::signal(self.control_fd.as_raw_fd());
    }

    /// Control messages since the last call.
    pub fn take_control(&self) -> VecDeque<ControlPacket> {
        eventfd::drain(self.control_fd.as_raw_fd());
        std::mem::take(&mut *lock(&self.control))
    }

    /// Notes why the guest lost the channel; the first reason stays.
    pub(crate) fn lose(&self, text: String) {
        lock(&self.fault).get_or_insert(text);
        eventfd::signal(self.control_fd.as_raw_fd());
    }

    /// Why the guest lost this channel.
    pub fn fault(&self) -> Option<String> {
        lock(&self.fault).clone()
    }

    pub(crate) fn tapping(&self) -> bool {
        self.tap.load(Ordering::Relaxed)
    }

    /// Starts or stops keeping a copy of every ring packet; what was kept is forgotten.
    pub fn tap(&self, on: bool) {
        self.tap.store(on, Ordering::Relaxed);
        *lock(&self.tapped) = Tape::default();
    }

    pub(crate) fn record(&self, from_guest: bool, packet: &[u8]) {
        let timestamp_ns = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_nanos() as u64);
        lock(&self.tapped).push(Tapped {
            timestamp_ns,
            from_guest,
            packet: packet.to_vec(),
        });
    }

    /// Ring packets since the last call; the oldest are lost when nobody asks.
    pub fn take_tapped(&self) -> VecDeque<Tapped> {
        std::mem::take(&mut *lock(&self.tapped)).packets
    }

    pub(crate) fn count_drop(&self, reason: DropReason) {
        if let Some(index) = REASONS.iter().position(|known| *known == reason) {
            self.drops[index].add(1);
        }
    }

    /// The counters of a queue; those of the primary for an index that no queue has.
    pub(crate) fn queue(&self, index: usize) -> &QueueCounters {
        self.queues.get(index).unwrap_or(&self.queues[0])
    }

    pub(crate) fn note_queue(&self, index: usize) {
        self.queues_seen.fetch_max(index + 1, Ordering::Relaxed);
    }

    /// Counters by name, those of the queues summed up.
    pub fn stats(&self) -> Vec<(&'static str, u64)> {
        let mut all = self.counters.list();
        for (name, count) in self.queue_stats().into_iter().flatten() {
            match all.iter_mut().find(|(known, _)| *known == name) {
                Some((_, sum)) => *sum += count,
                None => all.push((name, count)),
            }
        }
        all
    }

    /// Counters of each queue that was ever open, by index.
    pub fn queue_stats(&self) -> Vec<Vec<(&'static str, u64)>> {
        let seen = self.queues_seen.load(Ordering::Relaxed);
        let queues = self.queues.iter().take(seen);
        queues.map(QueueCounters::list).collect()
    }

    /// Frames that the channel itself refused, by drop-reason code.
    pub fn drops(&self) -> Vec<(u16, u64)> {
        REASONS
            .iter()
            .zip(&self.drops)
            .map(|(reason, count)| (*reason as u16, count.get()))
            .filter(|(_, count)| *count > 0)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tap_that_nobody_reads_keeps_a_bounded_number_of_bytes() {
        let mut tape = Tape::default();
        for number in 0..200 {
            tape.push(Tapped {
                timestamp_ns: number,
                from_guest: true,
                packet: vec![0; 512 << 10],
            });
        }
        assert_eq!(tape.bytes, TAP_BYTES);
        assert_eq!(tape.packets.len(), 32);
        assert_eq!(tape.packets.back().map(|last| last.timestamp_ns), Some(199));
        for number in 0..5000 {
            tape.push(Tapped {
                timestamp_ns: number,
                from_guest: true,
                packet: vec![0; 16],
            });
        }
        assert_eq!(tape.packets.len(), TAP_PACKETS);
        assert_eq!(tape.bytes, 16 * TAP_PACKETS);
    }
}

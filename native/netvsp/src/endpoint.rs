//! The worker's half of a channel: ring packets to frames, frames to receive-buffer sub-allocations.
//!
//! Hostile guest: every packet is copied out of the ring once, checked, then used, and a frame is copied once before
//! anyone judges it, so what the guest rewrites later is never delivered. A guest that breaks the ring or the protocol
//! loses this channel alone.

use std::collections::VecDeque;
use std::fmt::Display;
use std::ops::Range;
use std::os::fd::RawFd;
use std::sync::Arc;

use vswitch_memory::{BufferView, GuestMemory, Interrupt};
use vswitch_ring::{RingError, RingReader, RingWriter};
use vswitch_switch::drops::DropReason;
use vswitch_switch::endpoint::{Batch, Checksum, Endpoint, FrameRef, BATCH, HEAD_BYTES};
use vswitch_wire::nvsp::{
    NVSP_MSG1_TYPE_SEND_RNDIS_PKT as SEND_RNDIS_PKT,
    NVSP_MSG1_TYPE_SEND_RNDIS_PKT_COMPLETE as SEND_RNDIS_PKT_COMPLETE, NVSP_STAT_FAIL as FAILURE,
    NVSP_STAT_SUCCESS as SUCCESS,
};
use vswitch_wire::packet::{
    self, PacketRef, TransferRange, VM_PKT_COMP, VM_PKT_DATA_INBAND, VM_PKT_DATA_USING_GPA_DIRECT,
};

use crate::checksum::{find_transport, Segmenter, Transport};
use crate::guest_bytes::Source;
use crate::limits::{
    CONTROL_RESERVE, MAX_COMPLETIONS_QUEUED, MAX_CONTROL_BACKLOG_BYTES, MAX_CONTROL_BYTES,
    MAX_CONTROL_QUEUED, MAX_GPA_RANGES, MAX_MESSAGE_BYTES, MAX_PACKETS_PER_MESSAGE,
    MAX_RANGES_PER_PACKET, MAX_RSC_RANGES, PACKETS_PER_TURN,
};
use crate::receive_buffer::ReceiveBuffer;
use crate::receive_path::{Settings, RSC_FIRST, RSC_LAST, RSC_MULTIPLE, VALUE_INVALID};
use crate::rndis_data::{self, le32, Malformed, MessageHead};
use crate::shared::{Command, ControlKind, ControlPacket, Shared};

mod incoming;
mod publish;
mod transmit;

/// Bytes of an NVSP message in the ring: the fixed 28 of versions 1 to 6, padded.
const PADDED: usize = 32;
const COMPLETION_BYTES: usize = 16 + PADDED + 8;

struct SendBuffer {
    view: BufferView,
    section_size: usize,
}

/// Completions of the guest's packets that wait for `flush`.
enum Answer {
    Status(u32),
    Payload(Vec<u8>),
}

/// Host messages that wait for room in the ring or the receive buffer.
enum Waiting {
    Rndis(Vec<u8>),
    Inband(Vec<u8>, u64, bool),
}

impl Waiting {
    fn bytes(&self) -> usize {
        match self {
            Waiting::Rndis(message) => message.len(),
            // As the encoded packet counts: descriptor and padding.
            Waiting::Inband(payload, ..) => 16 + payload.len().next_multiple_of(8),
        }
    }
}

/// Receive-buffer ranges written but not yet sent, in packets.
#[derive(Default)]
struct Outgoing {
    ranges: Vec<TransferRange>,
    slots: Vec<u32>,
    /// Where each packet ends in `ranges`; the last is still open.
    ends: Vec<usize>,
}

impl Outgoing {
    fn clear(&mut self) {
        self.ranges.clear();
        self.slots.clear();
        self.ends.clear();
    }

    fn open_packet_len(&self) -> usize {
        let start = match self.ends.len() {
            0 | 1 => 0,
            count => self.ends[count - 2],
        };
        self.ranges.len() - start
    }

    /// Starts a new packet unless `need` more ranges fit in the open one.
    fn make_room(&mut self, need: usize, limit: usize) {
        if self.ends.is_empty() || self.open_packet_len() + need > limit {
            self.ends.push(self.ranges.len());
        }
    }

    fn add(&mut self, slot: u32, range: TransferRange) {
        self.slots.push(slot);
        self.ranges.push(range);
        if let Some(end) = self.ends.last_mut() {
            *end = self.ranges.len();
        }
    }
}

/// An `Endpoint` of the switch; see the crate's head.
pub struct ChannelEndpoint {
    memory: Arc<GuestMemory>,
    reader: RingReader,
    writer: RingWriter,
    interrupt: Arc<Interrupt>,
    shared: Arc<Shared>,
    receive: Option<ReceiveBuffer>,
    send: Option<SendBuffer>,
    settings: Settings,
    data: bool,
    masked: bool,
    lost: bool,
    completions: VecDeque<(u64, Answer)>,
    waiting: VecDeque<Waiting>,
    waiting_bytes: usize,
    outgoing: Outgoing,
    /// Reused: the ring packet, where the RNDIS bytes behind it lie, a private copy of them, a frame being rewritten,
    /// a segment, an encoded packet.
    packet: Vec<u8>,
    source: Source,
    message: Vec<u8>,
    work: Vec<u8>,
    piece: Vec<u8>,
    encoded: Vec<u8>,
}

impl ChannelEndpoint {
    pub(crate) fn new(
        memory: Arc<GuestMemory>,
        reader: RingReader,
        writer: RingWriter,
        interrupt: Arc<Interrupt>,
        shared: Arc<Shared>,
    ) -> Self {
        ChannelEndpoint {
            memory,
            reader,
            writer,
            interrupt,
            shared,
            receive: None,
            send: None,
            settings: Settings::default(),
            data: false,
            masked: false,
            lost: false,
            completions: VecDeque::new(),
            waiting: VecDeque::new(),
            waiting_bytes: 0,
            outgoing: Outgoing::default(),
            packet: Vec::new(),
            source: Source::default(),
            message: Vec::new(),
            work: Vec::new(),
            piece: Vec::new(),
            encoded: Vec::new(),
        }
    }

    fn lose(&mut self, text: impl Display) {
        if !self.lost {
            self.lost = true;
            self.outgoing.clear();
            self.shared.lose(text.to_string());
        }
    }

    fn stalled(&self) -> bool {
        self.completions.len() >= MAX_COMPLETIONS_QUEUED
    }

    // Commands.

    fn run_commands(&mut self) {
        if !self.shared.has_commands() {
            return;
        }
        for command in self.shared.take_commands() {
            self.run_command(command);
        }
    }

    fn run_command(&mut self, command: Command) {
        match command {
            Command::Inband {
                payload,
                transaction_id,
                completion,
            } => self.wait(Waiting::Inband(payload, transaction_id, completion)),
            Command::Complete {
                transaction_id,
                payload,
            } => self
                .completions
                .push_back((transaction_id, Answer::Payload(payload))),
            Command::Rndis(message) => self.wait(Waiting::Rndis(message)),
            Command::ReceiveBuffer {
                view,
                id,
                size,
                count,
            } => self.receive = Some(ReceiveBuffer::new(view, id, size, count)),
            Command::SendBuffer { view, section_size } => {
                self.send = Some(SendBuffer { view, section_size });
            }
            Command::RevokeReceiveBuffer => {
                self.outgoing.clear();
                self.waiting
                    .retain(|item| matches!(item, Waiting::Inband(..)));
                self.waiting_bytes = self.waiting.iter().map(Waiting::bytes).sum();
                self.receive = None;
                self.revoked(b"receive");
            }
            Command::RevokeSendBuffer => {
                self.send = None;
                self.revoked(b"send");
            }
            Command::Data(enabled) => self.data = enabled,
            Command::Link(up) => self.settings.link = up,
            Command::Filter { bits, address } => {
                self.settings.filter = bits;
                self.settings.address = address;
            }
            Command::Offload(bits) => self.settings.offload = bits,
            Command::Mtu(mtu) => self.settings.mtu = mtu,
        }
    }

    fn revoked(&self, which: &[u8]) {
        self.shared.push_control(ControlPacket {
            kind: ControlKind::Revoked,
            transaction_id: 0,
            completion_requested: false,
            payload: which.to_vec(),
        });
    }

    fn wait(&mut self, item: Waiting) {
        if self.waiting_bytes + item.bytes() > MAX_CONTROL_BACKLOG_BYTES {
            self.shared.counters.control_dropped.add(1);
            return;
        }
        self.waiting_bytes += item.bytes();
        self.waiting.push_back(item);
    }
}

impl Endpoint for ChannelEndpoint {
    fn wake_fd(&self) -> RawFd {
        self.shared.wake_fd()
    }

    fn receive(&mut self, batch: &mut Batch) -> bool {
        self.run_commands();
        if self.lost {
            return false;
        }
        if !self.masked {
            self.reader.mask();
            self.masked = true;
        }
        let mut more = true;
        for _ in 0..PACKETS_PER_TURN {
            if batch.len() + MAX_PACKETS_PER_MESSAGE > BATCH {
                break;
            }
            if self.stalled() || self.lost {
                more = false;
                break;
            }
            match self.take_packet(batch) {
                Ok(true) => {}
                Ok(false) => {
                    more = false;
                    break;
                }
                Err(error) => {
                    self.lose(error);
                    more = false;
                    break;
                }
            }
        }
        if batch.is_empty() {
            self.flush();
        }
        more
    }

    fn transmit(&mut self, frame: &FrameRef<'_>) -> Result<(), DropReason> {
        // Not between two frames of a batch: a completion would take the room that the first was promised, and a
        // revoked buffer would take the frame itself.
        if self.outgoing.ranges.is_empty() {
            self.run_commands();
        }
        let outcome = self.try_transmit(frame);
        if let Err(reason) = outcome {
            self.shared.count_drop(reason);
        }
        outcome
    }

    fn flush(&mut self) {
        if self.lost {
            return;
        }
        match self.publish() {
            Ok(true) => {
                self.shared.counters.signals.add(1);
                self.interrupt.signal();
            }
            Ok(false) => {}
            Err(error) => self.lose(error),
        }
    }

    fn rearm(&mut self) -> bool {
        if self.lost {
            return false;
        }
        self.masked = false;
        match self.reader.unmask() {
            // While completions wait for room, new packets stay unread: the guest's next read wakes us.
            Ok(arrived) => (arrived && !self.stalled()) || self.shared.has_commands(),
            Err(error) => {
                self.lose(error);
                false
            }
        }
    }
}

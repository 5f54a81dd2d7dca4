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

use vswitch_memory::{BufferView, GuestMemory};
use vswitch_ring::RingError;
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
    CONTROL_RESERVE, MAX_CONTROL_BACKLOG_BYTES, MAX_CONTROL_BYTES, MAX_CONTROL_QUEUED,
    MAX_GPA_RANGES, MAX_MESSAGE_BYTES, MAX_PACKETS_PER_MESSAGE, MAX_QUEUES, MAX_RANGES_PER_PACKET,
    MAX_RSC_RANGES, MAX_SEGMENTS, PACKETS_PER_TURN,
};
use crate::queue::{Answer, Queue, QueueError, Rings, CONTROL_107};
use crate::receive_buffer::ReceiveBuffer;
use crate::receive_path::{Settings, RSC_FIRST, RSC_LAST, RSC_MULTIPLE, VALUE_INVALID};
use crate::rndis_data::{self, le32, Malformed, MessageHead};
use crate::rss::{Placed, Rss};
use crate::shared::{Command, ControlKind, ControlPacket, Shared};

mod incoming;
mod publish;
mod transmit;

struct SendBuffer {
    view: BufferView,
    section_size: usize,
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

/// An `Endpoint` of the switch; see the crate's head.
pub struct ChannelEndpoint {
    memory: Arc<GuestMemory>,
    shared: Arc<Shared>,
    /// The primary channel first, then the sub-channels that are open.
    queues: Vec<Queue>,
    /// Where each queue is in `queues`.
    places: [Option<u8>; MAX_QUEUES],
    /// Place of the queue being served.
    current: usize,
    /// Frames were placed since the last `flush`.
    placed: bool,
    rss: Option<Box<Rss>>,
    receive: Option<ReceiveBuffer>,
    send: Option<SendBuffer>,
    settings: Settings,
    data: bool,
    lost: bool,
    waiting: VecDeque<Waiting>,
    waiting_bytes: usize,
    /// Reused: the ring packet, where the RNDIS bytes behind it lie, a private copy of them, a frame being rewritten,
    /// a segment.
    packet: Vec<u8>,
    source: Source,
    message: Vec<u8>,
    work: Vec<u8>,
    piece: Vec<u8>,
}

impl ChannelEndpoint {
    pub(crate) fn new(memory: Arc<GuestMemory>, primary: Rings, shared: Arc<Shared>) -> Self {
        let mut places = [None; MAX_QUEUES];
        places[0] = Some(0);
        ChannelEndpoint {
            memory,
            shared,
            queues: vec![Queue::new(primary)],
            places,
            current: 0,
            placed: false,
            rss: None,
            receive: None,
            send: None,
            settings: Settings::default(),
            data: false,
            lost: false,
            waiting: VecDeque::new(),
            waiting_bytes: 0,
            packet: Vec::new(),
            source: Source::default(),
            message: Vec::new(),
            work: Vec::new(),
            piece: Vec::new(),
        }
    }

    fn lose(&mut self, text: impl Display) {
        if !self.lost {
            self.lost = true;
            self.forget_outgoing();
            self.shared.lose(text.to_string());
        }
    }

    fn forget_outgoing(&mut self) {
        for queue in &mut self.queues {
            queue.outgoing.clear();
        }
    }

    /// Completes a packet of the queue being served.
    fn answer(&mut self, transaction_id: u64, answer: Answer) {
        if let Some(queue) = self.queues.get_mut(self.current) {
            queue.complete(transaction_id, answer);
        }
    }

    fn serves_primary(&self) -> bool {
        self.current == 0
    }

    fn open_queue(&mut self, rings: Rings) {
        if let Some(place @ None) = self.places.get_mut(rings.index) {
            *place = Some(self.queues.len() as u8);
            self.queues.push(Queue::new(rings));
        }
    }

    /// Lets go of the rings of a sub-channel. What the guest has not completed there comes back by itself.
    fn close_queue(&mut self, index: usize) {
        let place = match index {
            0 => None,
            _ => self.places.get_mut(index).and_then(Option::take),
        };
        if let Some(place) = place {
            let queue = self.queues.remove(usize::from(place));
            for later in self.places.iter_mut().flatten() {
                *later -= u8::from(*later > place);
            }
            self.current = 0;
            if let Some(receive) = self.receive.as_mut() {
                for slot in &queue.outgoing.slots {
                    receive.put_back(*slot);
                }
                receive.reclaim(index);
            }
        }
        self.shared.closed(index);
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
            } => {
                if let Some(primary) = self.queues.first_mut() {
                    primary.complete(transaction_id, Answer::Payload(payload));
                }
            }
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
                self.forget_outgoing();
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
            Command::Rss(rss) => self.rss = rss,
            Command::OpenQueue(rings) => self.open_queue(*rings),
            Command::CloseQueue(index) => self.close_queue(index),
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
        if self.placed {
            self.flush();
        }
        self.run_commands();
        if self.lost {
            return false;
        }
        let count = self.queues.len();
        let share = (PACKETS_PER_TURN / count.max(1)).max(1);
        let mut more = false;
        // The queues have turns, and the next batch begins with the next one.
        for _ in 0..count {
            self.current = (self.current + 1) % count;
            more |= self.take_packets(share, batch);
        }
        if batch.is_empty() {
            self.flush();
        }
        more
    }

    fn transmit(&mut self, frame: &FrameRef<'_>) -> Result<(), DropReason> {
        // Not between the frames of a batch: a completion or a revoked buffer would take what was promised to them.
        if !self.placed {
            self.run_commands();
        }
        let outcome = self.try_transmit(frame);
        self.placed |= outcome.is_ok();
        if let Err(reason) = outcome {
            self.shared.count_drop(reason);
        }
        outcome
    }

    fn flush(&mut self) {
        self.placed = false;
        if self.lost {
            return;
        }
        if let Err(error) = self.publish() {
            self.lose(error);
        }
    }

    fn rearm(&mut self) -> bool {
        if self.lost {
            return false;
        }
        let mut arrived = self.shared.has_commands();
        for queue in &mut self.queues {
            match queue.rearm() {
                Ok(packets) => arrived |= packets,
                Err(error) => {
                    self.lose(error);
                    return false;
                }
            }
        }
        arrived
    }

    fn failed(&mut self, why: &str) {
        self.shared.counters.host_failures.add(1);
        self.lose(format_args!("the host failed: {why}"));
    }
}

impl Drop for ChannelEndpoint {
    fn drop(&mut self) {
        self.queues.clear();
        self.receive = None;
        self.send = None;
        self.shared.worker_gone();
    }
}

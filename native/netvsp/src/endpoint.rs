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

const SEND_RNDIS_PKT: u32 = 107;
const SEND_RNDIS_PKT_COMPLETE: u32 = 108;
/// Bytes of a data message that are copied at once: RNDIS header, per-packet info, the head of the frame.
const PREFIX: usize = 320;
const NO_SECTION: u32 = 0xFFFF_FFFF;
const SUCCESS: u32 = 1;
const FAILURE: u32 = 2;
/// Bytes of an NVSP message in the ring: the fixed 28 of versions 1 to 6, padded.
const PADDED: usize = 32;
const COMPLETION_BYTES: usize = 16 + PADDED + 8;
/// Transaction ids of the host's own in-band requests have it; receive packets are numbered below 2^32.
const CONTROL_ID_BIT: u64 = 1 << 63;
/// RNDIS messages that a guest may send on the control channel: INITIALIZE to RESET, and KEEPALIVE.
const GUEST_CONTROL: [u32; 6] = [2, 3, 4, 5, 6, 8];
const DATA_107: [u8; PADDED] = message_107(0);
const CONTROL_107: [u8; PADDED] = message_107(1);

const fn message_107(channel_type: u8) -> [u8; PADDED] {
    let mut message = [0; PADDED];
    message[0] = SEND_RNDIS_PKT as u8;
    message[4] = channel_type;
    let mut at = 8;
    while at < 12 {
        message[at] = 0xFF;
        at += 1;
    }
    message
}

fn message_108(status: u32) -> [u8; PADDED] {
    let mut message = [0; PADDED];
    message[..4].copy_from_slice(&SEND_RNDIS_PKT_COMPLETE.to_le_bytes());
    message[4..8].copy_from_slice(&status.to_le_bytes());
    message
}

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

/// What follows a message's head.
enum Body<'a> {
    /// Private bytes.
    Bytes(&'a [u8]),
    /// The frame as it is.
    Frame(&'a FrameRef<'a>),
    /// Private headers, then a range of the frame.
    Split(&'a [u8], &'a FrameRef<'a>, Range<usize>),
}

impl Body<'_> {
    fn len(&self) -> usize {
        match self {
            Body::Bytes(data) => data.len(),
            Body::Frame(frame) => frame.len(),
            Body::Split(headers, _, range) => headers.len() + range.len(),
        }
    }
}

/// How a frame goes to the guest.
enum Plan {
    /// As it is, with these receive checksum flags.
    Whole(u32),
    /// With its transport checksum completed in a private copy.
    Completed(Transport),
    /// Cut into segments, with these flags.
    Segments(Segmenter, u32),
    /// One coalesced run of pieces of the private copy, with these flags.
    Coalesced(Segmenter, u32),
}

impl Plan {
    fn messages(&self) -> usize {
        match self {
            Plan::Whole(_) | Plan::Completed(_) => 1,
            Plan::Segments(segmenter, _) | Plan::Coalesced(segmenter, _) => segmenter.count(),
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

    // From the guest.

    fn drop_incoming(&self, batch: &mut Batch, reason: DropReason) {
        self.shared.count_drop(reason);
        batch.drop_one(reason);
    }

    fn refuse(&mut self, batch: &mut Batch, transaction_id: u64, requested: bool) {
        self.shared.counters.malformed.add(1);
        self.drop_incoming(batch, DropReason::InvalidPacket);
        if requested {
            self.completions
                .push_back((transaction_id, Answer::Status(FAILURE)));
        }
    }

    /// Takes the next ring packet; false when there is none.
    fn take_packet(&mut self, batch: &mut Batch) -> Result<bool, RingError> {
        let mut scratch = std::mem::take(&mut self.packet);
        let taken = match self.reader.next(&mut scratch) {
            Ok(Some(_)) => Ok(true),
            Ok(None) => Ok(false),
            Err(error) => Err(error),
        };
        if matches!(taken, Ok(true)) {
            if self.shared.tapping() {
                self.shared.record(true, &scratch);
            }
            match PacketRef::parse(&scratch) {
                Ok(packet) => self.dispatch(&packet, batch),
                Err(error) => self.lose(error),
            }
        }
        self.packet = scratch;
        taken
    }

    fn dispatch(&mut self, packet: &PacketRef<'_>, batch: &mut Batch) {
        let kind = packet.kind();
        let (id, requested) = (packet.transaction_id(), packet.completion_requested());
        match kind {
            VM_PKT_COMP => return self.take_completion(id, packet.payload),
            VM_PKT_DATA_INBAND => {}
            VM_PKT_DATA_USING_GPA_DIRECT => {
                if packet.validate().is_err() {
                    return self.refuse(batch, id, requested);
                }
            }
            _ => {
                return self.lose(format_args!(
                    "VMBus packet type {kind} on a network channel"
                ));
            }
        }
        match le32(packet.payload, 0) {
            None => self.lose("an NVSP message shorter than its type"),
            Some(SEND_RNDIS_PKT) => self.take_rndis(packet, batch),
            Some(message) if kind == VM_PKT_DATA_USING_GPA_DIRECT => {
                self.lose(format_args!(
                    "NVSP message {message} in a GPA-direct packet"
                ));
            }
            Some(_) => self.queue_control(ControlKind::Inband, id, requested, packet.payload),
        }
    }

    fn queue_control(&mut self, kind: ControlKind, id: u64, requested: bool, payload: &[u8]) {
        if !self.shared.control_has_room() {
            return self.lose(format_args!(
                "more than {MAX_CONTROL_QUEUED} control messages without waiting for an answer"
            ));
        }
        self.shared.push_control(ControlPacket {
            kind,
            transaction_id: id,
            completion_requested: requested,
            payload: payload.to_vec(),
        });
    }

    fn take_completion(&mut self, id: u64, payload: &[u8]) {
        if id & CONTROL_ID_BIT != 0 {
            return self.queue_control(ControlKind::Completion, id, false, payload);
        }
        let (Some(SEND_RNDIS_PKT_COMPLETE), Some(status)) = (le32(payload, 0), le32(payload, 4))
        else {
            return self.lose(format_args!(
                "completion {id:#x} without an NVSP receive status"
            ));
        };
        let Some(receive) = self.receive.as_mut() else {
            return;
        };
        if !receive.completed(id) {
            return self.lose(format_args!(
                "receive completion {id:#x} matches no packet sent"
            ));
        }
        if status != SUCCESS {
            self.shared.counters.receive_failures.add(1);
        }
    }

    fn take_rndis(&mut self, packet: &PacketRef<'_>, batch: &mut Batch) {
        let (id, requested) = (packet.transaction_id(), packet.completion_requested());
        let mut source = std::mem::take(&mut self.source);
        let outcome = match self.gather(packet, &mut source) {
            Ok(0) => Ok(self.take_data(&source, batch)),
            Ok(1) => self.take_control_message(id, &source).map(|()| SUCCESS),
            Ok(_) | Err(Malformed) => Err(Malformed),
        };
        self.source = source;
        match outcome {
            Ok(status) if requested => self.completions.push_back((id, Answer::Status(status))),
            Ok(_) => {}
            Err(Malformed) => self.refuse(batch, id, requested),
        }
    }

    /// Finds the RNDIS bytes of a 107, its send section and then its GPA ranges; gives the channel type.
    fn gather(&self, packet: &PacketRef<'_>, source: &mut Source) -> Result<u32, Malformed> {
        let field = |at| le32(packet.payload, at).ok_or(Malformed);
        let (channel_type, index, size) = (field(4)?, field(8)?, field(12)?);
        let direct = packet.kind() == VM_PKT_DATA_USING_GPA_DIRECT;
        let mut total = if index == NO_SECTION {
            0
        } else {
            u64::from(size)
        };
        if direct {
            let ranges = packet.gpa_ranges().map_err(|_| Malformed)?;
            if ranges.left() as usize > MAX_GPA_RANGES {
                return Err(Malformed);
            }
            for range in ranges {
                total += u64::from(range.map_err(|_| Malformed)?.byte_count);
            }
        }
        if total > MAX_MESSAGE_BYTES {
            return Err(Malformed);
        }
        source.clear();
        if index != NO_SECTION {
            let send = self.send.as_ref().ok_or(Malformed)?;
            let start = u64::from(index) * send.section_size as u64;
            if start + u64::from(size) > send.view.len() as u64 {
                return Err(Malformed);
            }
            source
                .add_view(&send.view, start as usize, size as usize)
                .map_err(|_| Malformed)?;
        }
        if direct {
            for range in packet.gpa_ranges().map_err(|_| Malformed)? {
                let range = range.map_err(|_| Malformed)?;
                let mut left = range.byte_count as usize;
                let mut skip = u64::from(range.byte_offset);
                for pfn in range.pfns() {
                    let take = left.min((4096 - skip) as usize);
                    source
                        .add(&self.memory, (pfn << 12) + skip, take)
                        .map_err(|_| Malformed)?;
                    left -= take;
                    skip = 0;
                }
            }
        }
        Ok(channel_type)
    }

    /// Frames of one to eight PACKET messages; those in front of a malformed one are good. Gives the NVSP status.
    fn take_data(&mut self, source: &Source, batch: &mut Batch) -> u32 {
        if !self.data {
            self.drop_incoming(batch, DropReason::NotReady);
            return FAILURE;
        }
        let mut offset = 0;
        let mut frames = 0;
        let mut bytes = 0;
        let mut good = source.len() > 0;
        while offset < source.len() {
            let taken = if frames < MAX_PACKETS_PER_MESSAGE {
                self.take_frame(source, offset, batch)
            } else {
                Err(Malformed)
            };
            let Ok((message, frame)) = taken else {
                good = false;
                break;
            };
            offset += message;
            frames += 1;
            bytes += frame as u64;
        }
        self.shared.counters.frames_from_guest.add(frames as u64);
        self.shared.counters.bytes_from_guest.add(bytes);
        if good {
            return SUCCESS;
        }
        self.shared.counters.malformed.add(1);
        self.drop_incoming(batch, DropReason::InvalidPacket);
        FAILURE
    }

    /// The frame of the message at `offset`: its head copied once, the rest left where it is. Gives the bytes of the
    /// message and of the frame.
    fn take_frame(
        &mut self,
        source: &Source,
        offset: usize,
        batch: &mut Batch,
    ) -> Result<(usize, usize), Malformed> {
        let remaining = source.len() - offset;
        let mut prefix = [0u8; PREFIX];
        let prefix = &mut prefix[..remaining.min(PREFIX)];
        if !source.copy(offset, prefix) {
            return Err(Malformed);
        }
        let header = rndis_data::parse_header(prefix, remaining)?;
        let have = prefix.len().min(header.message_length);
        let Some(records) = prefix.get(header.ppi_start..header.ppi_start + header.ppi_length)
        else {
            return self.take_whole(source, offset, batch);
        };
        let info = rndis_data::parse_info(records)?;
        let end = (header.data_start + header.data_length).min(have);
        let length = header.data_length;
        let Some(head) = prefix.get_mut(header.data_start..end) else {
            return self.take_whole(source, offset, batch);
        };
        let whole = head.len() == length;
        if !whole && head.len() < HEAD_BYTES {
            return self.take_whole(source, offset, batch);
        }
        let (meta, fill) = match rndis_data::apply(head, length, &info) {
            Ok(applied) => applied,
            // Headers longer than the head: judged on a copy of the whole.
            Err(Malformed) if !whole => return self.take_whole(source, offset, batch),
            Err(Malformed) => return Err(Malformed),
        };
        if let Some(transport) = fill {
            transport.fill_ipv4_header_checksum(head);
        }
        // `receive` keeps room for eight frames, and the length was checked.
        let Some(mut frame) = batch.begin() else {
            return Err(Malformed);
        };
        frame.head(head.len()).copy_from_slice(head);
        let tail = offset + header.data_start + head.len();
        if !whole && !source.each(tail, length - head.len(), |piece| frame.tail(piece)) {
            drop(frame);
            return self.take_whole(source, offset, batch);
        }
        if frame.finish(meta) {
            Ok((header.message_length, length))
        } else {
            Err(Malformed)
        }
    }

    /// As `take_frame`, from a private copy of the whole message: everything is judged anew, on that copy.
    fn take_whole(
        &mut self,
        source: &Source,
        offset: usize,
        batch: &mut Batch,
    ) -> Result<(usize, usize), Malformed> {
        let mut message = std::mem::take(&mut self.message);
        message.resize(source.len() - offset, 0);
        let taken = if source.copy(offset, &mut message) {
            push_whole(&mut message, batch)
        } else {
            Err(Malformed)
        };
        self.message = message;
        taken
    }

    fn take_control_message(&mut self, id: u64, source: &Source) -> Result<(), Malformed> {
        let mut message = vec![0; source.len().min(MAX_CONTROL_BYTES)];
        if !source.copy(0, &mut message) {
            return Err(Malformed);
        }
        let kind = le32(&message, 0).ok_or(Malformed)?;
        let length = le32(&message, 4).ok_or(Malformed)? as usize;
        if !GUEST_CONTROL.contains(&kind) || !(8..=message.len()).contains(&length) {
            return Err(Malformed);
        }
        message.truncate(length);
        if !self.shared.control_has_room() {
            return Err(Malformed);
        }
        self.queue_control(ControlKind::Rndis, id, false, &message);
        Ok(())
    }

    // To the guest.

    fn plan(&mut self, frame: &FrameRef<'_>) -> Result<Plan, DropReason> {
        let offload = frame.meta.offload;
        if offload.mss > 0 {
            return self.plan_large(frame, offload.mss as usize);
        }
        if offload.checksum == Checksum::None {
            return Ok(Plan::Whole(0));
        }
        let find = |head: &[u8]| {
            find_transport(head).filter(|transport| transport.is_tcp_or_udp(head.len()))
        };
        let mut transport = find(frame.head);
        if transport.is_none() && !frame.tail.is_empty() {
            // Headers longer than the head.
            self.copy_to_work(frame, frame.len());
            transport = find(&self.work);
        }
        let partial = offload.checksum == Checksum::Partial;
        let Some(transport) = transport else {
            return if partial {
                Err(DropReason::InvalidPacket)
            } else {
                Ok(Plan::Whole(0))
            };
        };
        let flags = self.settings.known_good(&transport);
        if !partial {
            return Ok(Plan::Whole(flags));
        }
        if flags != 0 {
            self.shared.counters.checksums_passed_on.add(1);
            return Ok(Plan::Whole(flags | VALUE_INVALID));
        }
        self.shared.counters.checksums_completed.add(1);
        Ok(Plan::Completed(transport))
    }

    fn plan_large(&mut self, frame: &FrameRef<'_>, mss: usize) -> Result<Plan, DropReason> {
        let parse = |head: &[u8]| {
            let transport = find_transport(head)?;
            Some((
                transport,
                Segmenter::new(head, frame.len(), transport, mss)?,
            ))
        };
        let mut parsed = parse(frame.head);
        if parsed.is_none() && !frame.tail.is_empty() {
            // Headers longer than the head.
            self.copy_to_work(frame, frame.len());
            parsed = parse(&self.work);
        }
        let (transport, segmenter) = parsed.ok_or(DropReason::InvalidPacket)?;
        if segmenter.count() > MAX_RSC_RANGES || segmenter.largest() > self.settings.mtu + 4 {
            return Err(DropReason::InvalidPacket);
        }
        let flags = self.settings.known_good(&transport);
        if self.settings.coalesces(&transport) && segmenter.count() > 1 {
            self.shared.counters.large_sends_coalesced.add(1);
            self.copy_to_work(frame, segmenter.payload_start);
            transport.make_whole(&mut self.work, frame.len());
            let flags = if flags == 0 { 0 } else { flags | VALUE_INVALID };
            return Ok(Plan::Coalesced(segmenter, flags));
        }
        self.shared.counters.large_sends_segmented.add(1);
        self.copy_to_work(frame, frame.len());
        Ok(Plan::Segments(segmenter, flags))
    }

    /// Copies the first `length` bytes of the frame to private memory.
    fn copy_to_work(&mut self, frame: &FrameRef<'_>, length: usize) {
        self.work.resize(length, 0);
        let done = frame.copy_prefix(&mut self.work);
        self.work.truncate(done);
    }

    fn try_transmit(&mut self, frame: &FrameRef<'_>) -> Result<(), DropReason> {
        if self.lost {
            return Err(DropReason::VmbusError);
        }
        if !self.data || self.receive.is_none() {
            return Err(DropReason::NotReady);
        }
        if let Some(reason) = self.settings.refusal(frame) {
            return Err(reason);
        }
        let plan = self.plan(frame)?;
        let count = plan.messages();
        let longest = match &plan {
            Plan::Whole(_) | Plan::Completed(_) => frame.len(),
            Plan::Segments(segmenter, _) | Plan::Coalesced(segmenter, _) => segmenter.largest(),
        };
        let slot_size = self.receive.as_ref().map_or(0, |receive| receive.size);
        let coalesced = matches!(plan, Plan::Coalesced(..));
        let sample = MessageHead::new(
            frame.meta.vlan_tci,
            match plan {
                Plan::Whole(flags) | Plan::Segments(_, flags) | Plan::Coalesced(_, flags) => flags,
                Plan::Completed(_) => 0,
            },
            coalesced.then_some(0),
            longest,
        );
        if sample.bytes().len() + longest > slot_size {
            return Err(DropReason::MtuMismatch);
        }
        let free = self.receive.as_ref().map_or(0, ReceiveBuffer::free_count);
        if free < count + CONTROL_RESERVE || !self.room_for(count) {
            return Err(DropReason::Resources);
        }
        let limit = if coalesced {
            MAX_RSC_RANGES
        } else {
            MAX_RANGES_PER_PACKET
        };
        if coalesced {
            self.outgoing.make_room(count, limit);
        }
        self.write_messages(frame, &plan, limit)?;
        self.shared.counters.frames_to_guest.add(1);
        self.shared.counters.bytes_to_guest.add(frame.len() as u64);
        Ok(())
    }

    fn write_messages(
        &mut self,
        frame: &FrameRef<'_>,
        plan: &Plan,
        limit: usize,
    ) -> Result<(), DropReason> {
        let vlan = frame.meta.vlan_tci;
        match plan {
            Plan::Whole(flags) => {
                let head = MessageHead::new(vlan, *flags, None, frame.len());
                self.write_message(&head, Body::Frame(frame), limit)
            }
            Plan::Completed(transport) => {
                self.copy_to_work(frame, frame.len());
                let mut work = std::mem::take(&mut self.work);
                transport.complete_checksum(&mut work);
                let head = MessageHead::new(vlan, 0, None, work.len());
                let written = self.write_message(&head, Body::Bytes(&work), limit);
                self.work = work;
                written
            }
            Plan::Segments(segmenter, flags) => {
                let work = std::mem::take(&mut self.work);
                let mut piece = std::mem::take(&mut self.piece);
                let mut written = Ok(());
                for index in 0..segmenter.count() {
                    segmenter.build(&work, index, &mut piece);
                    let head = MessageHead::new(vlan, *flags, None, piece.len());
                    written = written.and(self.write_message(&head, Body::Bytes(&piece), limit));
                }
                self.work = work;
                self.piece = piece;
                written
            }
            Plan::Coalesced(segmenter, flags) => {
                let work = std::mem::take(&mut self.work);
                let count = segmenter.count();
                let mut written = Ok(());
                for index in 0..count {
                    let range = segmenter.payload(index);
                    let mut mark = RSC_MULTIPLE;
                    if index == 0 {
                        mark |= RSC_FIRST;
                    }
                    if index + 1 == count {
                        mark |= RSC_LAST;
                    }
                    // The headers come from the private copy, where they were made true for the whole.
                    let headers = if index == 0 { work.as_slice() } else { &[] };
                    let length = headers.len() + range.len();
                    let head = MessageHead::new(vlan, *flags, Some(mark), length);
                    let body = Body::Split(headers, frame, range);
                    written = written.and(self.write_message(&head, body, limit));
                }
                self.work = work;
                written
            }
        }
    }

    fn write_message(
        &mut self,
        head: &MessageHead,
        body: Body<'_>,
        limit: usize,
    ) -> Result<(), DropReason> {
        let Some(receive) = self.receive.as_mut() else {
            return Err(DropReason::NotReady);
        };
        let Some(slot) = receive.take(false) else {
            return Err(DropReason::Resources);
        };
        let header = head.bytes();
        let at = header.len();
        let written = receive.write(slot, 0, header).and_then(|()| match &body {
            Body::Bytes(data) => receive.write(slot, at, data),
            Body::Frame(frame) => receive.write_frame(slot, at, frame, 0, frame.len()),
            Body::Split(headers, frame, range) => receive.write(slot, at, headers).and_then(|()| {
                let at = at + headers.len();
                receive.write_frame(slot, at, frame, range.start, range.len())
            }),
        });
        if written.is_err() {
            receive.put_back(slot);
            return Err(DropReason::VmbusError);
        }
        let range = TransferRange {
            byte_count: (header.len() + body.len()) as u32,
            byte_offset: (slot as usize * receive.size) as u32,
        };
        self.outgoing.make_room(1, limit);
        self.outgoing.add(slot, range);
        Ok(())
    }

    /// Whether the ring will surely take all that is pending and `count` more ranges, even if they start packets anew.
    fn room_for(&mut self, count: usize) -> bool {
        let ranges = self.outgoing.ranges.len() + count;
        let packets = self.outgoing.ends.len() + 1 + count / MAX_RANGES_PER_PACKET;
        let needed =
            packets * (24 + PADDED + 8) + 8 * ranges + COMPLETION_BYTES * self.completions.len();
        match self.writer.free() {
            Ok(free) => free as usize > needed,
            Err(error) => {
                self.lose(error);
                false
            }
        }
    }

    /// Writes what `encode` makes; the tap sees it.
    fn write_packet(
        &mut self,
        encode: impl FnOnce(&mut Vec<u8>) -> Result<(), vswitch_wire::WireError>,
    ) -> Result<bool, RingError> {
        encode(&mut self.encoded)?;
        let written = self.writer.write(&self.encoded)?;
        if written && self.shared.tapping() {
            self.shared.record(false, &self.encoded);
        }
        Ok(written)
    }

    fn publish(&mut self) -> Result<bool, RingError> {
        self.write_completions()?;
        self.write_outgoing()?;
        self.write_waiting()?;
        let data = self.writer.commit()?;
        let space = self.reader.commit()?;
        Ok(data || space)
    }

    fn write_completions(&mut self) -> Result<(), RingError> {
        while let Some((id, answer)) = self.completions.pop_front() {
            let written = match &answer {
                Answer::Status(status) => {
                    let message = message_108(*status);
                    self.write_packet(|out| packet::encode_completion(out, id, &message))?
                }
                Answer::Payload(payload) => {
                    self.write_packet(|out| packet::encode_completion(out, id, payload))?
                }
            };
            if !written {
                self.completions.push_front((id, answer));
                break;
            }
        }
        Ok(())
    }

    fn write_outgoing(&mut self) -> Result<(), RingError> {
        if self.outgoing.ranges.is_empty() {
            return Ok(());
        }
        let mut outgoing = std::mem::take(&mut self.outgoing);
        let mut start = 0;
        let mut shrank = false;
        for end in &outgoing.ends {
            let ranges = outgoing.ranges.get(start..*end).unwrap_or_default();
            let slots = outgoing.slots.get(start..*end).unwrap_or_default();
            start = *end;
            if ranges.is_empty() {
                continue;
            }
            let Some(receive) = self.receive.as_mut() else {
                break;
            };
            let (id, set) = (receive.sent(slots), receive.id);
            shrank |= !self.write_packet(|out| {
                packet::encode_transfer_pages(out, id, set, ranges, &DATA_107, true)
            })?;
        }
        outgoing.clear();
        self.outgoing = outgoing;
        if shrank {
            // `room_for` was wrong only if the guest moved its read index back: a lie.
            self.lose("the ring towards the guest shrank while frames were on their way");
        }
        Ok(())
    }

    fn write_waiting(&mut self) -> Result<(), RingError> {
        while let Some(item) = self.waiting.pop_front() {
            let written = match &item {
                Waiting::Rndis(message) => self.write_control(message)?,
                Waiting::Inband(payload, id, completion) => {
                    self.write_packet(|out| packet::encode_inband(out, payload, *id, *completion))?
                }
            };
            if !written {
                self.waiting.push_front(item);
                break;
            }
            self.waiting_bytes -= item.bytes();
        }
        Ok(())
    }

    fn write_control(&mut self, message: &[u8]) -> Result<bool, RingError> {
        let Some(receive) = self.receive.as_mut() else {
            self.shared.counters.control_dropped.add(1);
            return Ok(true);
        };
        let Some(slot) = receive.take(true) else {
            return Ok(false);
        };
        if message.len() > receive.size || receive.write(slot, 0, message).is_err() {
            receive.put_back(slot);
            self.shared.counters.control_dropped.add(1);
            return Ok(true);
        }
        let (set, id) = (receive.id, u64::from(slot));
        let ranges = [TransferRange {
            byte_count: message.len() as u32,
            byte_offset: (slot as usize * receive.size) as u32,
        }];
        let written = self.write_packet(|out| {
            packet::encode_transfer_pages(out, id, set, &ranges, &CONTROL_107, true)
        })?;
        if let Some(receive) = self.receive.as_mut() {
            if written {
                receive.sent(&[slot]);
            } else {
                receive.put_back(slot);
            }
        }
        Ok(written)
    }
}

/// Puts the frame of the private `message` into the batch; bytes of the message and of the frame.
fn push_whole(message: &mut [u8], batch: &mut Batch) -> Result<(usize, usize), Malformed> {
    let header = rndis_data::parse_header(message, message.len())?;
    let records = message
        .get(header.ppi_start..header.ppi_start + header.ppi_length)
        .ok_or(Malformed)?;
    let info = rndis_data::parse_info(records)?;
    let frame = message
        .get_mut(header.data_start..header.data_start + header.data_length)
        .ok_or(Malformed)?;
    let (meta, fill) = rndis_data::apply(frame, frame.len(), &info)?;
    if let Some(transport) = fill {
        transport.fill_ipv4_header_checksum(frame);
    }
    if batch.push(frame, meta) {
        Ok((header.message_length, header.data_length))
    } else {
        Err(Malformed)
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
        self.run_commands();
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

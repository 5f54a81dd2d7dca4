//! From the guest: ring packets to frames, control messages and receive completions.

use vswitch_wire::rndis::{
    RNDIS_MSG_HALT, RNDIS_MSG_INIT, RNDIS_MSG_KEEPALIVE, RNDIS_MSG_QUERY, RNDIS_MSG_RESET,
    RNDIS_MSG_SET,
};

use super::*;

/// Bytes of a data message that are copied at once: RNDIS header, per-packet info, the head of the frame.
const PREFIX: usize = 320;
const NO_SECTION: u32 = 0xFFFF_FFFF;
/// RNDIS messages that a guest may send on the control channel: INITIALIZE to RESET, and KEEPALIVE.
const GUEST_CONTROL: [u32; 6] = [
    RNDIS_MSG_INIT,
    RNDIS_MSG_HALT,
    RNDIS_MSG_QUERY,
    RNDIS_MSG_SET,
    RNDIS_MSG_RESET,
    RNDIS_MSG_KEEPALIVE,
];
/// Transaction ids of the host's own in-band requests have it; receive packets are numbered below 2^32.
const CONTROL_ID_BIT: u64 = 1 << 63;

impl ChannelEndpoint {
    pub(super) fn drop_incoming(&self, batch: &mut Batch, reason: DropReason) {
        self.shared.count_drop(reason);
        batch.drop_one(reason);
    }

    pub(super) fn refuse(&mut self, batch: &mut Batch, transaction_id: u64, requested: bool) {
        self.shared.counters.malformed.add(1);
        self.drop_incoming(batch, DropReason::InvalidPacket);
        if requested {
            self.answer(transaction_id, Answer::Status(FAILURE));
        }
    }

    /// Takes up to `limit` packets of the current queue; false when nothing more is there now.
    pub(super) fn take_packets(&mut self, limit: usize, batch: &mut Batch) -> bool {
        if let Some(queue) = self.queues.get_mut(self.current) {
            queue.mask();
        }
        for _ in 0..limit {
            if batch.len() + MAX_PACKETS_PER_MESSAGE > BATCH {
                return true;
            }
            match self.take_packet(batch) {
                Ok(true) => {}
                Ok(false) => return false,
                Err(error) => {
                    self.lose(error);
                    return false;
                }
            }
        }
        true
    }

    /// Takes the next ring packet; false when there is none.
    fn take_packet(&mut self, batch: &mut Batch) -> Result<bool, RingError> {
        let queue = self.queues.get_mut(self.current);
        let Some(queue) = queue.filter(|queue| !queue.stalled() && !self.lost) else {
            return Ok(false);
        };
        let mut scratch = std::mem::take(&mut self.packet);
        let taken = match queue.reader.next(&mut scratch) {
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
            Some(message) if !self.serves_primary() => {
                self.lose(format_args!("NVSP message {message} on a sub-channel"));
            }
            Some(_) => self.queue_control(ControlKind::Inband, id, requested, packet.payload),
        }
    }

    fn queue_control(&mut self, kind: ControlKind, id: u64, requested: bool, payload: &[u8]) {
        if payload.len() > MAX_CONTROL_BYTES {
            return self.lose(format_args!(
                "control message of {} bytes, at most {MAX_CONTROL_BYTES} expected",
                payload.len()
            ));
        }
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
        if id & CONTROL_ID_BIT != 0 && self.serves_primary() {
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
        let queue = self.queues.get(self.current).map_or(0, |queue| queue.index);
        if !receive.completed(id, queue) {
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
            Ok(1) if self.serves_primary() => {
                self.take_control_message(id, &source).map(|()| SUCCESS)
            }
            Ok(_) | Err(Malformed) => Err(Malformed),
        };
        self.source = source;
        match outcome {
            Ok(status) if requested => self.answer(id, Answer::Status(status)),
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
        let before = batch.len();
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
        if !self.settings.link {
            for _ in before..batch.len() {
                self.drop_incoming(batch, DropReason::Disconnected);
            }
            batch.truncate(before);
        }
        let queue = self.queues.get(self.current).map_or(0, |queue| queue.index);
        let counters = self.shared.queue(queue);
        counters.frames_from_guest.add(frames as u64);
        counters.bytes_from_guest.add(bytes);
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
            return self.take_whole(source, offset, header.message_length, batch);
        };
        let info = rndis_data::parse_info(records)?;
        let end = (header.data_start + header.data_length).min(have);
        let length = header.data_length;
        let Some(head) = prefix.get_mut(header.data_start..end) else {
            return self.take_whole(source, offset, header.message_length, batch);
        };
        let whole = head.len() == length;
        if !whole && head.len() < HEAD_BYTES {
            return self.take_whole(source, offset, header.message_length, batch);
        }
        let (meta, fill) = match rndis_data::apply(head, length, &info) {
            Ok(applied) => applied,
            // Headers longer than the head: judged on a copy of the whole.
            Err(Malformed) if !whole => {
                return self.take_whole(source, offset, header.message_length, batch)
            }
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
            return self.take_whole(source, offset, header.message_length, batch);
        }
        if frame.finish(meta) {
            Ok((header.message_length, length))
        } else {
            Err(Malformed)
        }
    }

    /// As `take_frame`, from a private copy of the `length` bytes that the message said it has: everything is judged anew,
    /// on that copy. Not of all that follows: a few small messages would have it copied over and over.
    fn take_whole(
        &mut self,
        source: &Source,
        offset: usize,
        length: usize,
        batch: &mut Batch,
    ) -> Result<(usize, usize), Malformed> {
        let mut message = std::mem::take(&mut self.message);
        message.resize(length, 0);
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

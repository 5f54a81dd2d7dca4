//! One queue of a NIC: the ring pair of one channel and what waits for room in it.
//!
//! `netvsp/queue.py` is the document of record. Queue 0 is the primary channel and alone carries control messages; the
//! others are sub-channels.

use std::collections::VecDeque;
use std::sync::Arc;

use vswitch_memory::Interrupt;
use vswitch_ring::{RingError, RingReader, RingWriter};
use vswitch_wire::nvsp::{
    NVSP_MSG1_TYPE_SEND_RNDIS_PKT as SEND_RNDIS_PKT,
    NVSP_MSG1_TYPE_SEND_RNDIS_PKT_COMPLETE as SEND_RNDIS_PKT_COMPLETE,
};
use vswitch_wire::packet::{self, TransferRange};
use vswitch_wire::WireError;

use crate::limits::{MAX_COMPLETIONS_QUEUED, MAX_RANGES_PER_PACKET};
use crate::receive_buffer::ReceiveBuffer;
use crate::shared::Shared;

/// Bytes of an NVSP message in the ring: the fixed 28 of versions 1 to 6, padded.
const PADDED: usize = 32;
pub(crate) const DATA_107: [u8; PADDED] = message_107(0);
pub(crate) const CONTROL_107: [u8; PADDED] = message_107(1);

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

/// Completions of the guest's packets that wait for `flush`.
pub(crate) enum Answer {
    Status(u32),
    Payload(Vec<u8>),
}

impl Answer {
    /// What its packet takes of the ring: descriptor, padded payload, trailer.
    fn ring_bytes(&self) -> usize {
        let payload = match self {
            Answer::Status(_) => PADDED,
            Answer::Payload(payload) => payload.len().next_multiple_of(8),
        };
        16 + payload + 8
    }
}

/// Receive-buffer ranges written but not yet sent, in packets.
#[derive(Default)]
pub(crate) struct Outgoing {
    ranges: Vec<TransferRange>,
    pub(crate) slots: Vec<u32>,
    /// Where each packet ends in `ranges`; the last is still open.
    ends: Vec<usize>,
}

impl Outgoing {
    pub(crate) fn clear(&mut self) {
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
    pub(crate) fn make_room(&mut self, need: usize, limit: usize) {
        if self.ends.is_empty() || self.open_packet_len() + need > limit {
            self.ends.push(self.ranges.len());
        }
    }

    pub(crate) fn add(&mut self, slot: u32, range: TransferRange) {
        self.slots.push(slot);
        self.ranges.push(range);
        if let Some(end) = self.ends.last_mut() {
            *end = self.ranges.len();
        }
    }
}

/// Why a queue cannot go on.
pub(crate) enum QueueError {
    Ring(RingError),
    /// There is less room than there was: the guest moved its read index back.
    Shrank,
}

impl From<RingError> for QueueError {
    fn from(error: RingError) -> Self {
        QueueError::Ring(error)
    }
}

impl std::fmt::Display for QueueError {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            QueueError::Ring(error) => error.fmt(out),
            QueueError::Shrank => {
                out.write_str("the ring towards the guest shrank while frames were on their way")
            }
        }
    }
}

/// Rings as the control half mapped them.
pub(crate) struct Rings {
    pub(crate) index: usize,
    pub(crate) reader: RingReader,
    pub(crate) writer: RingWriter,
    pub(crate) interrupt: Arc<Interrupt>,
}

/// Rings, completions that wait, received frames that were placed and not sent.
pub(crate) struct Queue {
    pub(crate) index: usize,
    pub(crate) reader: RingReader,
    writer: RingWriter,
    interrupt: Arc<Interrupt>,
    masked: bool,
    completions: VecDeque<(u64, Answer)>,
    /// What they take of the ring.
    completion_bytes: usize,
    pub(crate) outgoing: Outgoing,
    encoded: Vec<u8>,
}

impl Queue {
    pub(crate) fn new(rings: Rings) -> Self {
        Queue {
            index: rings.index,
            reader: rings.reader,
            writer: rings.writer,
            interrupt: rings.interrupt,
            masked: false,
            completions: VecDeque::new(),
            completion_bytes: 0,
            outgoing: Outgoing::default(),
            encoded: Vec::new(),
        }
    }

    /// Owes the guest the completion of its packet `id`.
    pub(crate) fn complete(&mut self, id: u64, answer: Answer) {
        self.completion_bytes += answer.ring_bytes();
        self.completions.push_back((id, answer));
    }

    /// Too many completions wait: the guest's packets stay unread.
    pub(crate) fn stalled(&self) -> bool {
        self.completions.len() >= MAX_COMPLETIONS_QUEUED
    }

    /// The guest need not signal from here on.
    pub(crate) fn mask(&mut self) {
        if !self.masked {
            self.reader.mask();
            self.masked = true;
        }
    }

    /// Lets the guest signal again; true = packets arrived meanwhile.
    pub(crate) fn rearm(&mut self) -> Result<bool, RingError> {
        self.masked = false;
        // While completions wait for room, new packets stay unread: the guest's next read wakes us.
        Ok(self.reader.unmask()? && !self.stalled())
    }

    /// Whether the ring will surely take all that is pending and `count` more ranges, even if they start packets anew.
    pub(crate) fn room_for(&mut self, count: usize) -> Result<bool, RingError> {
        let ranges = self.outgoing.ranges.len() + count;
        let packets = self.outgoing.ends.len() + 1 + count / MAX_RANGES_PER_PACKET;
        let needed = packets * (24 + PADDED + 8) + 8 * ranges + self.completion_bytes;
        Ok(self.writer.free()? as usize > needed)
    }

    /// Writes what `encode` makes; the tap sees it. False = no room now.
    pub(crate) fn write(
        &mut self,
        shared: &Shared,
        encode: impl FnOnce(&mut Vec<u8>) -> Result<(), WireError>,
    ) -> Result<bool, RingError> {
        encode(&mut self.encoded)?;
        let written = self.writer.write(&self.encoded)?;
        if written && shared.tapping() {
            shared.record(false, &self.encoded);
        }
        Ok(written)
    }

    /// Writes the completions that wait, as far as there is room; whether that was all of them.
    pub(crate) fn write_completions(&mut self, shared: &Shared) -> Result<bool, RingError> {
        while let Some((id, answer)) = self.completions.pop_front() {
            let written = match &answer {
                Answer::Status(status) => {
                    let message = message_108(*status);
                    self.write(shared, |out| packet::encode_completion(out, id, &message))?
                }
                Answer::Payload(payload) => {
                    self.write(shared, |out| packet::encode_completion(out, id, payload))?
                }
            };
            if !written {
                self.completions.push_front((id, answer));
                return Ok(false);
            }
            self.completion_bytes -= answer.ring_bytes();
        }
        Ok(true)
    }

    /// Sends the received frames that were placed.
    pub(crate) fn write_outgoing(
        &mut self,
        receive: Option<&mut ReceiveBuffer>,
        shared: &Shared,
    ) -> Result<(), QueueError> {
        if self.outgoing.ranges.is_empty() {
            return Ok(());
        }
        let mut outgoing = std::mem::take(&mut self.outgoing);
        let mut start = 0;
        let mut shrank = false;
        if let Some(receive) = receive {
            for end in &outgoing.ends {
                let ranges = outgoing.ranges.get(start..*end).unwrap_or_default();
                let slots = outgoing.slots.get(start..*end).unwrap_or_default();
                start = *end;
                if ranges.is_empty() {
                    continue;
                }
                let (id, set) = (receive.sent(slots, self.index), receive.id);
                shrank |= !self.write(shared, |out| {
                    packet::encode_transfer_pages(out, id, set, ranges, &DATA_107, true)
                })?;
            }
        }
        outgoing.clear();
        self.outgoing = outgoing;
        if shrank {
            // `room_for` was wrong only if the guest moved its read index back: a lie.
            return Err(QueueError::Shrank);
        }
        Ok(())
    }

    /// Publishes both indices and signals the guest if it waits.
    pub(crate) fn commit(&mut self, shared: &Shared) -> Result<(), RingError> {
        let data = self.writer.commit()?;
        let space = self.reader.commit()?;
        if data || space {
            shared.queue(self.index).signals.add(1);
            self.interrupt.signal();
        }
        Ok(())
    }
}

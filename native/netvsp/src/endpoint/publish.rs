//! To the ring: completions first, then received frames, then control messages that wait for room.

use super::*;

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

impl ChannelEndpoint {
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

    pub(super) fn publish(&mut self) -> Result<bool, RingError> {
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

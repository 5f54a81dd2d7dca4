//! To the rings: completions first, then received frames, then control messages that wait for room.

use super::*;

impl ChannelEndpoint {
    pub(super) fn publish(&mut self) -> Result<(), QueueError> {
        for at in 0..self.queues.len() {
            let Some(queue) = self.queues.get_mut(at) else {
                break;
            };
            // A completion without room has said how much it needs: a smaller packet would go through and clear that.
            if queue.write_completions(&self.shared)? {
                queue.write_outgoing(self.receive.as_mut(), &self.shared)?;
                if queue.index == 0 {
                    self.write_waiting()?;
                }
            }
            if let Some(queue) = self.queues.get_mut(at) {
                queue.commit(&self.shared)?;
            }
        }
        Ok(())
    }

    /// What the host has to say, on the primary channel.
    fn write_waiting(&mut self) -> Result<(), RingError> {
        while let Some(item) = self.waiting.pop_front() {
            let written = match &item {
                Waiting::Rndis(message) => self.write_control(message)?,
                Waiting::Inband(payload, id, completion) => {
                    self.write_primary(|out| packet::encode_inband(out, payload, *id, *completion))?
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

    fn write_primary(
        &mut self,
        encode: impl FnOnce(&mut Vec<u8>) -> Result<(), vswitch_wire::WireError>,
    ) -> Result<bool, RingError> {
        match self.queues.first_mut() {
            Some(primary) => primary.write(&self.shared, encode),
            None => Ok(true),
        }
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
        let written = self.write_primary(|out| {
            packet::encode_transfer_pages(out, id, set, &ranges, &CONTROL_107, true)
        })?;
        if let Some(receive) = self.receive.as_mut() {
            if written {
                receive.sent(&[slot], 0);
            } else {
                receive.put_back(slot);
            }
        }
        Ok(written)
    }
}

//! What comes from the host: ring packets, completions, RNDIS messages, frames for the interface.

use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering;

use vswitch_memory::eventfd;
use vswitch_ring::RingError;
use vswitch_wire::packet::{self, PacketRef};
use vswitch_wire::WireError;

use super::{
    take, word, Control, Count, Kind, Path, BACKLOG_LIMIT, ID_BOUNCE, ID_CONTROL, ID_SECTION,
    LARGEST_FRAME, RNDIS_PACKET_MSG, SEND_RNDIS_PKT_COMPLETE, STATUS_FAILURE, STATUS_SUCCESS, TURN,
};
use crate::frames::{self, RSC_FIRST, RSC_LAST, VNET_SIZE};

impl Path {
    /// Reads what the host wrote; true when it stopped before the ring was empty.
    pub(super) fn receive(&mut self) -> Result<bool, RingError> {
        let mut scratch = std::mem::take(&mut self.packet);
        let done = self.receive_into(&mut scratch);
        self.packet = scratch;
        done
    }

    fn receive_into(&mut self, scratch: &mut Vec<u8>) -> Result<bool, RingError> {
        self.reader.mask();
        let mut budget = TURN;
        loop {
            let blocked = self.backlog.len() >= BACKLOG_LIMIT;
            if budget == 0 || blocked {
                self.return_space()?;
                if blocked {
                    // The host signals when it made room for what waits.
                    self.reader.unmask()?;
                }
                return Ok(!blocked);
            }
            match self.reader.next(scratch)? {
                Some(packet) => {
                    budget -= 1;
                    self.on_packet(&packet)?;
                }
                None => {
                    self.return_space()?;
                    if !self.reader.unmask()? {
                        return Ok(false);
                    }
                    self.reader.mask();
                }
            }
        }
    }

    fn return_space(&mut self) -> Result<(), RingError> {
        if self.reader.commit()? {
            eventfd::signal(self.signal_fd.as_raw_fd());
        }
        Ok(())
    }

    fn on_packet(&mut self, packet: &PacketRef<'_>) -> Result<(), RingError> {
        match packet.kind() {
            packet::VM_PKT_DATA_USING_XFER_PAGES => self.on_receive(packet),
            packet::VM_PKT_COMP => self.on_completion(packet),
            packet::VM_PKT_DATA_INBAND => self.tell(
                Kind::Inband,
                packet.transaction_id(),
                packet.completion_requested(),
                packet.payload,
            ),
            other => Err(WireError::Unknown {
                protocol: "VMBus packet",
                number: u32::from(other),
            }
            .into()),
        }
    }

    fn tell(
        &mut self,
        kind: Kind,
        transaction_id: u64,
        completion_requested: bool,
        payload: &[u8],
    ) -> Result<(), RingError> {
        let told = self.shared.tell(Control {
            kind,
            transaction_id,
            completion_requested,
            payload: payload.to_vec(),
        });
        if told {
            return Ok(());
        }
        Err(WireError::Bad {
            what: "control messages",
            why: "the host sends more than the driver takes",
        }
        .into())
    }

    fn on_completion(&mut self, packet: &PacketRef<'_>) -> Result<(), RingError> {
        let id = packet.transaction_id();
        let (kind, index) = (id & !0xFFFF_FFFF, (id & 0xFFFF_FFFF) as usize);
        let freed = match kind {
            0 => return self.tell(Kind::Completion, id, false, packet.payload),
            ID_SECTION => take(&mut self.busy_sections, index, &mut self.free_sections),
            ID_BOUNCE => take(&mut self.busy_bounces, index, &mut self.free_bounces),
            ID_CONTROL if index == 0 && self.rndis_busy => {
                self.rndis_busy = false;
                self.shared.requests.fetch_sub(1, Ordering::AcqRel);
                true
            }
            _ => false,
        };
        if !freed {
            self.count(Count::StrayCompletions, 1);
        } else if packet.payload.len() >= 8 && word(packet.payload, 4) != STATUS_SUCCESS {
            self.count(Count::TxErrors, 1);
        }
        Ok(())
    }

    fn on_receive(&mut self, packet: &PacketRef<'_>) -> Result<(), RingError> {
        let mut message = std::mem::take(&mut self.message);
        let status = self.receive_ranges(packet, &mut message);
        self.message = message;
        let status = status?;
        if packet.completion_requested() {
            let mut body = [0; 8];
            let (head, tail) = body.split_at_mut(4);
            head.copy_from_slice(&SEND_RNDIS_PKT_COMPLETE.to_le_bytes());
            tail.copy_from_slice(&status.to_le_bytes());
            self.put_completion(packet.transaction_id(), &body)?;
        }
        Ok(())
    }

    fn receive_ranges(
        &mut self,
        packet: &PacketRef<'_>,
        message: &mut Vec<u8>,
    ) -> Result<u32, RingError> {
        let (set_id, ranges) = packet.transfer_ranges()?;
        let mut status = STATUS_SUCCESS;
        let mut run: Option<(u32, Option<u16>)> = None;
        for range in ranges {
            let (offset, count) = (range.byte_offset as usize, range.byte_count as usize);
            let inside =
                u64::from(range.byte_offset) + u64::from(range.byte_count) <= self.receive_size;
            let view = self
                .receive_view
                .as_ref()
                .filter(|_| inside && set_id == self.set_id);
            let read = match view {
                Some(view) => {
                    message.resize(count, 0);
                    view.read(offset, message).is_ok()
                }
                None => false,
            };
            if !read || !self.on_message(message, &mut run)? {
                self.count(Count::RxErrors, 1);
                status = STATUS_FAILURE;
            }
        }
        if run.is_some() {
            self.count(Count::RxErrors, 1);
            status = STATUS_FAILURE;
        }
        Ok(status)
    }

    /// One RNDIS message; false when it is malformed.
    fn on_message(
        &mut self,
        message: &[u8],
        run: &mut Option<(u32, Option<u16>)>,
    ) -> Result<bool, RingError> {
        let length = word(message, 4) as usize;
        if message.len() < 8 || length < 8 || length > message.len() {
            return Ok(false);
        }
        if word(message, 0) != RNDIS_PACKET_MSG {
            let whole = message.get(..length).unwrap_or_default();
            self.tell(Kind::Rndis, 0, false, whole)?;
            return Ok(true);
        }
        let Ok(received) = frames::receive(message) else {
            return Ok(false);
        };
        let frame = message
            .get(received.start..received.start + received.length)
            .unwrap_or_default();
        let Some(fragment) = received.fragment else {
            *run = None;
            self.begin(frame);
            self.deliver(received.checksum, received.vlan);
            return Ok(true);
        };
        if fragment & RSC_FIRST != 0 {
            *run = Some((received.checksum, received.vlan));
            self.begin(frame);
        } else if run.is_none() || self.assembly.len() + frame.len() > LARGEST_FRAME {
            *run = None;
            return Ok(false);
        } else {
            self.assembly.extend_from_slice(frame);
        }
        if fragment & RSC_LAST != 0 {
            if let Some((checksum, vlan)) = run.take() {
                self.deliver(checksum, vlan);
            }
        }
        Ok(true)
    }

    fn begin(&mut self, frame: &[u8]) {
        self.assembly.clear();
        self.assembly.resize(VNET_SIZE, 0);
        self.assembly.extend_from_slice(frame);
    }

    fn deliver(&mut self, checksum: u32, vlan: Option<u16>) {
        let length = self.assembly.len() - VNET_SIZE;
        if !self.running || length < 14 {
            self.count(Count::RxDropped, 1);
            return;
        }
        frames::finish(&mut self.assembly, checksum, vlan, self.mtu);
        if self.link.write(&self.assembly) {
            self.count(Count::RxPackets, 1);
            self.count(Count::RxBytes, length as u64);
        } else {
            self.count(Count::RxDropped, 1);
        }
    }
}

//! To the guest: a frame, its offloads completed or passed on, into receive-buffer sub-allocations.

use super::*;

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
    /// With its transport checksum completed in a private copy, and these flags.
    Completed(Transport, u32),
    /// Cut into segments, with these flags.
    Segments(Segmenter, u32),
    /// One coalesced run: the headers of the private copy, payload from the sender's memory; with these flags.
    Coalesced(Segmenter, u32),
    /// One coalesced run of pieces of the private copy, its checksum completed, with these flags.
    Rewritten(Segmenter, u32),
}

impl Plan {
    fn messages(&self) -> usize {
        match self {
            Plan::Whole(_) | Plan::Completed(..) => 1,
            Plan::Segments(segmenter, _)
            | Plan::Coalesced(segmenter, _)
            | Plan::Rewritten(segmenter, _) => segmenter.count(),
        }
    }
}

/// Where a frame goes.
#[derive(Clone, Copy)]
struct To {
    /// Place of the queue.
    at: usize,
    placed: Option<Placed>,
}

impl ChannelEndpoint {
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
        if flags != 0 && self.settings.takes_partial() {
            self.shared.counters.checksums_passed_on.add(1);
            return Ok(Plan::Whole(flags | VALUE_INVALID));
        }
        self.shared.counters.checksums_completed.add(1);
        Ok(Plan::Completed(transport, flags))
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
        if segmenter.count() > MAX_SEGMENTS {
            return Err(DropReason::InvalidPacket);
        }
        if segmenter.largest() > self.settings.largest(frame.head) {
            return Err(DropReason::MtuMismatch);
        }
        let flags = self.settings.known_good(&transport);
        if self.settings.coalesces(&transport) && (2..=MAX_RSC_RANGES).contains(&segmenter.count())
        {
            self.shared.counters.large_sends_coalesced.add(1);
            if flags != 0 && self.settings.takes_partial() {
                self.shared.counters.checksums_passed_on.add(1);
                self.copy_to_work(frame, segmenter.payload_start);
                transport.make_whole(&mut self.work, frame.len());
                return Ok(Plan::Coalesced(segmenter, flags | VALUE_INVALID));
            }
            self.shared.counters.checksums_completed.add(1);
            self.copy_to_work(frame, frame.len());
            transport.make_whole(&mut self.work, frame.len());
            transport.complete_checksum(&mut self.work);
            return Ok(Plan::Rewritten(segmenter, flags));
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

    pub(super) fn try_transmit(&mut self, frame: &FrameRef<'_>) -> Result<(), DropReason> {
        if self.lost {
            return Err(DropReason::VmbusError);
        }
        if !self.data || self.receive.is_none() {
            return Err(DropReason::NotReady);
        }
        if let Some(reason) = self.settings.refusal(frame) {
            return Err(reason);
        }
        let to = self.place(frame);
        let plan = self.plan(frame)?;
        let count = plan.messages();
        let longest = match &plan {
            Plan::Whole(_) | Plan::Completed(..) => frame.len(),
            Plan::Segments(segmenter, _)
            | Plan::Coalesced(segmenter, _)
            | Plan::Rewritten(segmenter, _) => segmenter.largest(),
        };
        let slot_size = self.receive.as_ref().map_or(0, |receive| receive.size);
        let coalesced = matches!(plan, Plan::Coalesced(..) | Plan::Rewritten(..));
        let sample = MessageHead::new(
            frame.meta.vlan_tci,
            match plan {
                Plan::Whole(flags)
                | Plan::Completed(_, flags)
                | Plan::Segments(_, flags)
                | Plan::Coalesced(_, flags)
                | Plan::Rewritten(_, flags) => flags,
            },
            to.placed,
            coalesced.then_some(0),
            longest,
        );
        if sample.bytes().len() + longest > slot_size {
            return Err(DropReason::MtuMismatch);
        }
        let free = self.receive.as_ref().map_or(0, ReceiveBuffer::free_count);
        if free < count + CONTROL_RESERVE || !self.room_for(to, count) {
            return Err(DropReason::Resources);
        }
        let limit = if coalesced {
            MAX_RSC_RANGES
        } else {
            MAX_RANGES_PER_PACKET
        };
        if let (true, Some(queue)) = (coalesced, self.queues.get_mut(to.at)) {
            queue.outgoing.make_room(count, limit);
        }
        self.write_messages(frame, &plan, to, limit)?;
        let queue = self.queues.get(to.at).map_or(0, |queue| queue.index);
        let counters = self.shared.queue(queue);
        counters.frames_to_guest.add(1);
        counters.bytes_to_guest.add(frame.len() as u64);
        Ok(())
    }

    /// The frame's queue; the primary where there is no other.
    fn place(&self, frame: &FrameRef<'_>) -> To {
        let placed = self.rss.as_ref().and_then(|rss| rss.place(frame.head));
        let place = placed.and_then(|placed| *self.places.get(placed.queue)?);
        To {
            at: usize::from(place.unwrap_or(0)),
            placed,
        }
    }

    fn write_messages(
        &mut self,
        frame: &FrameRef<'_>,
        plan: &Plan,
        to: To,
        limit: usize,
    ) -> Result<(), DropReason> {
        let vlan = frame.meta.vlan_tci;
        match plan {
            Plan::Whole(flags) => {
                let head = MessageHead::new(vlan, *flags, to.placed, None, frame.len());
                self.write_message(&head, Body::Frame(frame), to, limit)
            }
            Plan::Completed(transport, flags) => {
                self.copy_to_work(frame, frame.len());
                let mut work = std::mem::take(&mut self.work);
                transport.complete_checksum(&mut work);
                let head = MessageHead::new(vlan, *flags, to.placed, None, work.len());
                let written = self.write_message(&head, Body::Bytes(&work), to, limit);
                self.work = work;
                written
            }
            Plan::Segments(segmenter, flags) => {
                let work = std::mem::take(&mut self.work);
                let mut piece = std::mem::take(&mut self.piece);
                let mut written = Ok(());
                for index in 0..segmenter.count() {
                    segmenter.build(&work, index, &mut piece);
                    let head = MessageHead::new(vlan, *flags, to.placed, None, piece.len());
                    written =
                        written.and(self.write_message(&head, Body::Bytes(&piece), to, limit));
                }
                self.work = work;
                self.piece = piece;
                written
            }
            Plan::Coalesced(segmenter, flags) | Plan::Rewritten(segmenter, flags) => {
                let rewritten = matches!(plan, Plan::Rewritten(..));
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
                    if rewritten {
                        let start = if index == 0 { 0 } else { range.start };
                        let piece = work.get(start..range.end).unwrap_or_default();
                        let head =
                            MessageHead::new(vlan, *flags, to.placed, Some(mark), piece.len());
                        let body = Body::Bytes(piece);
                        written = written.and(self.write_message(&head, body, to, limit));
                        continue;
                    }
                    // The headers come from the private copy, where they were made true for the whole.
                    let headers = if index == 0 { work.as_slice() } else { &[] };
                    let length = headers.len() + range.len();
                    let head = MessageHead::new(vlan, *flags, to.placed, Some(mark), length);
                    let body = Body::Split(headers, frame, range);
                    written = written.and(self.write_message(&head, body, to, limit));
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
        to: To,
        limit: usize,
    ) -> Result<(), DropReason> {
        let (Some(receive), Some(queue)) = (self.receive.as_mut(), self.queues.get_mut(to.at))
        else {
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
        queue.outgoing.make_room(1, limit);
        queue.outgoing.add(slot, range);
        Ok(())
    }

    fn room_for(&mut self, to: To, count: usize) -> bool {
        let room = self
            .queues
            .get_mut(to.at)
            .map(|queue| queue.room_for(count));
        match room {
            Some(Ok(room)) => room,
            Some(Err(error)) => {
                self.lose(error);
                false
            }
            None => false,
        }
    }
}

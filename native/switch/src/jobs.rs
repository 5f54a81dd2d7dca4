//! Frames whose walk waits for an extension, traces, and the extensions themselves: the rest of [`Core`].

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use crate::core::{prepare, Core};
use crate::drops::DropReason;
use crate::endpoint::{FrameRef, Meta};
use crate::events::Event;
use crate::fields::{self, key_mask, Key};
use crate::parse::Packet;
use crate::program::{Answer, Drop, Program, TraceStep};
use crate::upcall::{Link, Request, MAX_FRAME};
use crate::walk::{Filter, Stop, Surroundings, Walk};

/// What must stay in order: addresses, protocol and ports, but all fragments of a host pair together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct FlowKey(Key);

impl FlowKey {
    pub fn of(packet: &Packet) -> Self {
        const HOSTS: u64 = fields::IN_PORT
            | fields::ETH_DST
            | fields::ETH_SRC
            | fields::ETH_TYPE
            | fields::VLAN_TCI
            | fields::IP_PROTO
            | fields::IP_SRC
            | fields::IP_DST;
        let fragment = packet.key.get(fields::IP_FRAG.trailing_zeros() as usize) != 0;
        let mask = if fragment {
            HOSTS
        } else {
            HOSTS | fields::L4_SRC | fields::L4_DST
        };
        FlowKey(packet.key.masked(&key_mask(mask)))
    }
}

/// A frame in private memory, since it outlives its batch.
pub(crate) struct OwnedFrame {
    data: Vec<u8>,
    meta: Meta,
}

impl OwnedFrame {
    fn of(frame: &FrameRef<'_>) -> Self {
        OwnedFrame {
            data: frame.to_vec(usize::MAX),
            meta: frame.meta,
        }
    }

    fn as_ref(&self) -> FrameRef<'_> {
        FrameRef::whole(&self.data, self.meta)
    }
}

/// A frame whose walk waits, with those of its flow behind it; or a trace.
pub(crate) struct Job {
    packet: Packet,
    frame: OwnedFrame,
    walk: Walk,
    flow: FlowKey,
    generation: u64,
    held: VecDeque<(Packet, OwnedFrame)>,
    /// The trace's id.
    trace: Option<u64>,
}

impl Core {
    /// Puts a frame behind the one of its flow that waits.
    pub(crate) fn hold(&mut self, holder: u64, packet: Packet, frame: &FrameRef<'_>) {
        let room = self.held < self.limits.held_total;
        match self.jobs.get_mut(&holder) {
            Some(job) if room && job.held.len() < self.limits.held_per_flow => {
                job.held.push_back((packet, OwnedFrame::of(frame)));
                self.held += 1;
            }
            _ => {
                let drop = Drop::new(
                    DropReason::Resources,
                    "too many frames wait for an extension's verdict",
                );
                self.drop_frame(&packet, frame, packet.in_port, false, &drop);
            }
        }
    }

    /// Makes a job of a frame that has to wait, unless its port has too many of them.
    pub(crate) fn suspend(
        &mut self,
        packet: Packet,
        frame: &FrameRef<'_>,
        walk: Walk,
        filter: u64,
        out_port: Option<u32>,
    ) {
        let Some(port) = self.tables.ports.get_mut(&packet.in_port) else {
            return;
        };
        if port.walks >= self.limits.upcalls_per_port {
            let drop = Drop::new(
                DropReason::Resources,
                "too many frames of the port wait for extensions",
            );
            self.drop_frame(&packet, frame, packet.in_port, false, &drop);
            return;
        }
        port.walks += 1;
        let id = self.next_job;
        self.next_job += 1;
        let flow = FlowKey::of(&packet);
        self.holders.insert(flow, id);
        let job = Job {
            packet,
            frame: OwnedFrame::of(frame),
            walk,
            flow,
            generation: self.generation,
            held: VecDeque::new(),
            trace: None,
        };
        self.proceed(id, job, Stop::Ask { filter, out_port });
    }

    /// Takes a job as far as it goes without waiting.
    fn proceed(&mut self, id: u64, mut job: Job, mut stop: Stop) {
        loop {
            match stop {
                Stop::Done(program) => {
                    self.finish(job, program);
                    return;
                }
                Stop::Ask { filter, out_port } => match self.ask(id, &job, filter, out_port) {
                    None => {
                        self.jobs.insert(id, job);
                        return;
                    }
                    answer => stop = job.walk.resume(&job.packet, &mut self.tables, answer),
                },
            }
        }
    }

    fn ask(&mut self, id: u64, job: &Job, filter: u64, out_port: Option<u32>) -> Option<Answer> {
        let now_ns = self.tell_time();
        let Some(link) = self.links.get_mut(&filter) else {
            return Some(Answer::default());
        };
        let port_name = self
            .tables
            .port_name(out_port.unwrap_or(job.packet.in_port));
        let request = Request {
            in_port: job.packet.in_port,
            out_port,
            vlan_tci: job.frame.meta.vlan_tci,
            frame_length: job.packet.length,
            port_name: &port_name,
            data: &job.frame.data[..job.frame.data.len().min(MAX_FRAME)],
            trace: job.trace.is_some(),
            large_send: job.packet.mss != 0,
        };
        let answer = link.ask(&request, id, now_ns);
        if answer.is_none() && job.trace.is_none() {
            self.tables.counters.upcalls += 1;
        }
        answer
    }

    fn finish(&mut self, mut job: Job, program: Program) {
        if let Some(id) = job.trace {
            self.finish_trace(id, job, &program);
            return;
        }
        self.release(&job);
        let program = Arc::new(program);
        self.publish(&job.packet, job.generation, &job.walk.recorder, &program);
        self.execute(&job.packet, &job.frame.as_ref(), &program);
        while let Some((packet, frame)) = job.held.pop_front() {
            self.held -= 1;
            self.decide(packet, &frame.as_ref());
        }
    }

    fn release(&mut self, job: &Job) {
        self.holders.remove(&job.flow);
        if let Some(port) = self.tables.ports.get_mut(&job.packet.in_port) {
            port.walks = port.walks.saturating_sub(1);
        }
    }

    /// The source port of waiting frames is gone: drops them and what waits behind them.
    pub(crate) fn abandon_port(&mut self, port_id: u32) {
        let ids: Vec<u64> = self
            .jobs
            .iter()
            .filter(|(_, job)| job.packet.in_port == port_id)
            .map(|(id, _)| *id)
            .collect();
        for id in ids {
            let Some(mut job) = self.jobs.remove(&id) else {
                continue;
            };
            self.give_up(|waiter| waiter == id);
            let drop = Drop::new(DropReason::Disconnected, "its source port was removed");
            if let Some(id) = job.trace {
                let recorder = &mut job.walk.recorder;
                recorder.step("receive", "drop", 0, None, Some(&drop), || {
                    drop.detail.to_string()
                });
                let steps = std::mem::take(&mut recorder.steps);
                self.events.put(Event::TraceDone { id, steps });
                continue;
            }
            self.release(&job);
            self.drop_frame(&job.packet, &job.frame.as_ref(), port_id, false, &drop);
            self.held -= job.held.len();
            for (packet, frame) in &job.held {
                self.drop_frame(packet, &frame.as_ref(), port_id, false, &drop);
            }
        }
    }

    /// Ports or extensions changed: nothing cached holds, and waiting frames are judged anew.
    pub(crate) fn changed(&mut self) {
        self.tell_time();
        self.generation += 1;
        self.tables.flows.flush();
        let ports = self.tables.ports.iter();
        self.tables.connected = ports
            .filter(|(_, port)| port.endpoint.is_some())
            .map(|(id, _)| *id)
            .collect();
        self.tables.connected.sort_unstable();
        let waiting: Vec<u64> = self.jobs.keys().copied().collect();
        self.give_up(|_| true);
        for id in waiting {
            let Some(mut job) = self.jobs.remove(&id) else {
                continue;
            };
            job.walk = Walk::new(job.trace.is_some());
            job.generation = self.generation;
            self.trace_head(&mut job);
            let stop = job.walk.resume(&job.packet, &mut self.tables, None);
            self.proceed(id, job, stop);
        }
        self.flush();
    }

    fn give_up(&mut self, wanted: impl Fn(u64) -> bool) {
        for link in self.links.values_mut() {
            link.give_up(&wanted);
        }
    }

    // -- extensions --

    /// Replaces the extension list by `order`, which names links that are there or in `fresh`; returns the links
    /// that are no longer used.
    pub fn set_links(&mut self, order: Vec<u64>, fresh: Vec<Link>) -> Vec<Link> {
        for link in fresh {
            self.links.insert(link.channel.id, link);
        }
        let filters = |wanted: fn(&Link) -> bool| -> Vec<Filter> {
            let links = order.iter().filter_map(|id| self.links.get(id));
            links
                .filter(|link| wanted(link))
                .map(|link| Filter {
                    id: link.channel.id,
                    name: link.name.clone(),
                })
                .collect()
        };
        self.tables.ingress = filters(|link| link.channel.ingress);
        self.tables.egress = filters(|link| link.channel.egress);
        self.tables.egress.reverse();
        self.order = order;
        self.changed();
        let (kept, gone): (BTreeMap<u64, Link>, BTreeMap<u64, Link>) =
            std::mem::take(&mut self.links)
                .into_iter()
                .partition(|(id, _)| self.order.contains(id));
        self.links = kept;
        gone.into_values().collect()
    }

    pub fn has_link(&self, id: u64) -> bool {
        self.links.contains_key(&id)
    }

    pub fn links(&self) -> impl Iterator<Item = &Link> {
        self.order.iter().filter_map(|id| self.links.get(id))
    }

    /// Takes the replies of one extension.
    pub fn replies(&mut self, id: u64) {
        self.tell_time();
        let Some(link) = self.links.get_mut(&id) else {
            return;
        };
        let errors = link.counters.errors;
        let mut settled = Vec::new();
        let result = link.replies(&mut settled);
        if link.counters.errors != errors {
            let why = link.counters.why.clone();
            self.events.put(Event::ExtensionError { id, why });
        }
        self.settle(settled);
        if let Err(why) = result {
            self.fail_link(id, &why);
        }
        self.flush();
    }

    pub(crate) fn push_links(&mut self) {
        loop {
            let dirty: Vec<u64> = self
                .links
                .iter()
                .filter(|(_, link)| link.dirty)
                .map(|(id, _)| *id)
                .collect();
            if dirty.is_empty() {
                return;
            }
            for id in dirty {
                if let Some(Err(why)) = self.links.get_mut(&id).map(Link::push) {
                    self.fail_link(id, &why);
                }
            }
        }
    }

    pub(crate) fn fail_overdue(&mut self, now_ns: u64) {
        let seconds = self.limits.upcall_deadline_ns as f64 / 1e9;
        for id in self.order.clone() {
            let deadline = self.links.get(&id).and_then(Link::next_deadline_ns);
            if deadline.is_some_and(|deadline| now_ns >= deadline) {
                self.fail_link(id, &format!("no verdict within {seconds} s"));
            }
        }
    }

    /// The extension broke the protocol or is gone: its `on_failure` applies to all that waits for it.
    pub fn fail_link(&mut self, id: u64, why: &str) {
        let Some(link) = self.links.get_mut(&id) else {
            return;
        };
        if link.failed() {
            return;
        }
        self.tables.counters.upcall_failures += 1;
        let settled = link.fail(why);
        self.events.put(Event::ExtensionFailed {
            id,
            why: why.to_owned(),
        });
        self.settle(settled);
    }

    fn settle(&mut self, settled: Vec<(u64, Answer)>) {
        for (id, answer) in settled {
            if let Some(mut job) = self.jobs.remove(&id) {
                let stop = job.walk.resume(&job.packet, &mut self.tables, Some(answer));
                self.proceed(id, job, stop);
            }
        }
    }

    // -- trace and barrier --

    /// Walks a frame through the pipeline without any effect; the steps come as an event.
    pub fn trace(&mut self, id: u64, port_id: u32, data: &[u8], meta: Meta) {
        self.tell_time();
        let frame = FrameRef::whole(data, meta);
        let mut packet = Packet::new(0, port_id, &frame);
        let mtu = self.tables.ports.get(&port_id).map_or(0, |port| port.mtu);
        if let Some(drop) = prepare(&mut packet, &frame, mtu) {
            let steps = vec![TraceStep {
                stage: "receive",
                verdict: "drop",
                detail: drop.detail.to_string(),
                fields: 0,
                port_id: None,
                reason: Some(drop.reason),
                by: None,
            }];
            self.events.put(Event::TraceDone { id, steps });
            return;
        }
        let mut job = Job {
            packet,
            frame: OwnedFrame::of(&frame),
            walk: Walk::new(true),
            flow: FlowKey::of(&packet),
            generation: self.generation,
            held: VecDeque::new(),
            trace: Some(id),
        };
        self.trace_head(&mut job);
        let stop = job.walk.resume(&job.packet, &mut self.tables, None);
        let job_id = self.next_job;
        self.next_job += 1;
        self.proceed(job_id, job, stop);
        self.flush();
    }

    fn trace_head(&mut self, job: &mut Job) {
        let name = self.tables.port_name(job.packet.in_port);
        let length = job.packet.length;
        job.walk
            .recorder
            .step("receive", "continue", 0, None, None, || {
                format!("{length} bytes from {name}")
            });
    }

    fn finish_trace(&mut self, id: u64, mut job: Job, program: &Program) {
        for destination in &program.destinations {
            let port_id = destination.port_id;
            if destination.drop.is_none()
                && self.tables.egress_policy(&job.packet, port_id).is_none()
            {
                let name = self.tables.port_name(port_id);
                let recorder = &mut job.walk.recorder;
                recorder.step("deliver", "deliver", 0, Some(port_id), None, || {
                    format!("to {name}")
                });
            }
        }
        let steps = std::mem::take(&mut job.walk.recorder.steps);
        self.events.put(Event::TraceDone { id, steps });
    }

    /// Tells by an event when no frame that is here by now waits for an extension; later ones do not count.
    pub fn barrier(&mut self, id: u64) {
        self.barriers.push((id, self.packet_id));
        self.flush();
    }

    pub(crate) fn answer_barriers(&mut self) {
        // What is held behind a frame is younger than it.
        let frames = self.jobs.values().filter(|job| job.trace.is_none());
        let oldest = frames.map(|job| job.packet.id).min().unwrap_or(u64::MAX);
        let events = &self.events;
        self.barriers.retain(|&(id, last)| {
            let waits = oldest <= last;
            if !waits {
                events.put(Event::BarrierDone { id });
            }
            waits
        });
    }
}

//! The datapath's state and a frame's way through it. The twin of `vswitch/engine/python/datapath.py`.
//!
//! `service` takes a batch from an endpoint; `receive` counts and captures each frame; `decide` finds a cached program
//! or starts a walk; `execute` does what the program says. Everything here runs on the worker thread, one call at a
//! time, so nothing is locked.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::clock::Clock;
use crate::counters::{Cast, PortCounters, SwitchCounters};
use crate::drops::DropReason;
use crate::endpoint::{guarded, Batch, Endpoint, FrameRef, Meta, MAX_FRAME};
use crate::events::{Event, EventQueue};
use crate::flows::{FlowCache, Publication};
use crate::hash::FastMap;
use crate::jobs::{FlowKey, Job};
use crate::limits::Limits;
use crate::mac::{Learned, MacKey, MacTable};
use crate::parse::{parse, Packet, ETHERNET_HEADER};
use crate::program::{Destination, Drop, Program};
use crate::tap::{Sighting, Tap};
use crate::upcall::Link;
use crate::walk::{Filter, Recorder, Stop, Surroundings, Walk};

/// How often ages are looked at, and how often a cached flow refreshes its source address.
pub const TICK_NS: u64 = 1_000_000_000;

pub(crate) struct Port {
    pub name: String,
    pub mtu: usize,
    pub endpoint: Option<Box<dyn Endpoint>>,
    pub counters: PortCounters,
    /// Frames from this port with an upcall in flight.
    pub walks: usize,
}

/// What a walk consults.
pub(crate) struct Tables {
    pub ports: FastMap<u32, Port>,
    pub connected: Vec<u32>,
    pub macs: MacTable,
    pub flows: FlowCache,
    pub counters: SwitchCounters,
    pub ingress: Vec<Filter>,
    pub egress: Vec<Filter>,
    pub now_ns: u64,
}

impl Tables {
    pub fn forget_macs(&mut self, keys: Vec<MacKey>) {
        for key in keys {
            self.counters.macs_purged += 1;
            self.flows.invalidate(key);
        }
    }
}

impl Surroundings for Tables {
    fn ingress(&self) -> &[Filter] {
        &self.ingress
    }

    fn egress(&self) -> &[Filter] {
        &self.egress
    }

    fn port_name(&self, port_id: u32) -> String {
        self.ports
            .get(&port_id)
            .map_or_else(|| port_id.to_string(), |port| port.name.clone())
    }

    fn connected(&self) -> &[u32] {
        &self.connected
    }

    fn lookup(&self, key: MacKey) -> Option<u32> {
        self.macs.lookup(key)
    }

    fn learn(&mut self, key: MacKey, port_id: u32) -> bool {
        let counter = match self.macs.learn(key, port_id, self.now_ns) {
            Learned::Known => return true,
            Learned::Refused => {
                self.counters.macs_refused += 1;
                return false;
            }
            Learned::New => &mut self.counters.macs_learned,
            Learned::Moved => &mut self.counters.macs_moved,
        };
        *counter += 1;
        self.flows.invalidate(key);
        true
    }

    fn egress_policy(&self, packet: &Packet, port_id: u32) -> Option<Drop> {
        match self.ports.get(&port_id) {
            Some(Port {
                endpoint: Some(_),
                mtu,
                ..
            }) => {
                if packet.l3_length > *mtu && packet.mss == 0 {
                    let detail = format!(
                        "{} bytes exceed the destination's MTU of {mtu}",
                        packet.l3_length
                    );
                    return Some(Drop::new(DropReason::MtuMismatch, detail));
                }
                None
            }
            _ => Some(Drop::new(
                DropReason::Disconnected,
                "no NIC is connected to the port",
            )),
        }
    }
}

/// One datapath.
pub struct Core {
    pub(crate) limits: Limits,
    pub(crate) clock: Clock,
    pub(crate) tables: Tables,
    pub(crate) links: BTreeMap<u64, Link>,
    /// Ids of the links in the order of the extensions.
    pub(crate) order: Vec<u64>,
    pub(crate) jobs: BTreeMap<u64, Job>,
    pub(crate) holders: FastMap<FlowKey, u64>,
    pub(crate) held: usize,
    pub(crate) next_job: u64,
    pub(crate) generation: u64,
    /// Id, and the last frame that it waits for.
    pub(crate) barriers: Vec<(u64, u64)>,
    pub(crate) events: Arc<EventQueue>,
    pub(crate) next_tick_ns: u64,
    taps: Vec<Arc<Tap>>,
    pub(crate) packet_id: u64,
    touched: Vec<u32>,
    /// Endpoints whose code panicked; the worker takes them out of its poller and drops them.
    broken: Vec<(u32, Box<dyn Endpoint>)>,
}

impl Core {
    pub fn new(limits: Limits, clock: Clock, events: Arc<EventQueue>) -> Self {
        let now_ns = clock.now_ns();
        Core {
            limits,
            tables: Tables {
                ports: FastMap::default(),
                connected: Vec::new(),
                macs: MacTable::new(&limits),
                flows: FlowCache::new(&limits),
                counters: SwitchCounters::default(),
                ingress: Vec::new(),
                egress: Vec::new(),
                now_ns,
            },
            links: BTreeMap::new(),
            order: Vec::new(),
            jobs: BTreeMap::new(),
            holders: FastMap::default(),
            held: 0,
            next_job: 1,
            generation: 0,
            barriers: Vec::new(),
            events,
            next_tick_ns: now_ns + TICK_NS,
            taps: Vec::new(),
            packet_id: 0,
            touched: Vec::new(),
            broken: Vec::new(),
            clock,
        }
    }

    /// Reads the clock; everything until the next call happens at that time.
    pub fn tell_time(&mut self) -> u64 {
        self.tables.now_ns = self.clock.now_ns();
        self.tables.now_ns
    }

    // -- ports and endpoints --

    pub fn add_port(&mut self, port_id: u32, name: String, mtu: usize) -> Result<(), String> {
        if self.tables.ports.contains_key(&port_id) {
            return Err(format!("port {port_id} exists already"));
        }
        let port = Port {
            name,
            mtu,
            endpoint: None,
            counters: PortCounters::default(),
            walks: 0,
        };
        self.tables.ports.insert(port_id, port);
        Ok(())
    }

    pub fn remove_port(&mut self, port_id: u32) {
        self.detach(port_id);
        self.tables.ports.remove(&port_id);
        let keys = self.tables.macs.forget_port(port_id);
        self.tables.forget_macs(keys);
        self.abandon_port(port_id);
        self.changed();
    }

    /// Whether the port exists, and whether it has an endpoint.
    pub fn port_state(&self, port_id: u32) -> Option<bool> {
        self.tables
            .ports
            .get(&port_id)
            .map(|port| port.endpoint.is_some())
    }

    pub fn attach(&mut self, port_id: u32, endpoint: Box<dyn Endpoint>) {
        if let Some(port) = self.tables.ports.get_mut(&port_id) {
            port.endpoint = Some(endpoint);
        }
        self.changed();
    }

    /// The port's endpoint panicked: it is the fault of this endpoint alone, and nobody else's trouble.
    fn endpoint_failed(&mut self, port_id: u32, why: &str) {
        let endpoint = self
            .tables
            .ports
            .get_mut(&port_id)
            .and_then(|port| port.endpoint.take());
        let Some(mut endpoint) = endpoint else {
            return;
        };
        let why = format!("its endpoint panicked: {why}");
        // Should telling the owner panic as well, there is nothing more to be done for it.
        let _told = guarded(endpoint.as_mut(), |endpoint| endpoint.failed(&why));
        self.broken.push((port_id, endpoint));
        self.tables.counters.endpoints_failed += 1;
        self.events.put(Event::PortDisconnected { port_id, why });
        self.changed();
    }

    /// Endpoints to be let go of.
    pub(crate) fn take_broken(&mut self) -> Vec<(u32, Box<dyn Endpoint>)> {
        std::mem::take(&mut self.broken)
    }

    /// Lets go of the port's endpoint: it is dropped before this returns.
    pub fn detach(&mut self, port_id: u32) {
        self.flush();
        let endpoint = self
            .tables
            .ports
            .get_mut(&port_id)
            .and_then(|port| port.endpoint.take());
        if endpoint.is_some() {
            drop(endpoint);
            self.changed();
        }
    }

    pub fn inject(&mut self, port_id: u32, data: &[u8], meta: Meta) {
        self.tell_time();
        self.receive(port_id, &FrameRef::whole(data, meta));
        self.flush();
    }

    /// Takes one batch from the port's endpoint; true = there is, or may be, more.
    pub fn service(&mut self, port_id: u32, batch: &mut Batch) -> bool {
        batch.clear();
        let Some(endpoint) = self
            .tables
            .ports
            .get_mut(&port_id)
            .and_then(|port| port.endpoint.as_mut())
        else {
            return false;
        };
        let more = match guarded(endpoint.as_mut(), |endpoint| endpoint.receive(batch)) {
            Ok(more) => more,
            Err(why) => {
                batch.clear();
                self.endpoint_failed(port_id, &why);
                return false;
            }
        };
        self.tell_time();
        for &reason in batch.dropped() {
            self.count_drop(port_id, false, &Drop::new(reason, "dropped by the NIC"));
        }
        for index in 0..batch.len() {
            if let Some(frame) = batch.frame(index) {
                self.receive(port_id, &frame);
            }
        }
        let busy = more || !batch.is_empty();
        batch.clear();
        self.touched.push(port_id);
        self.flush();
        if busy {
            return true;
        }
        self.with_endpoint(port_id, |endpoint| endpoint.rearm())
            .unwrap_or(false)
    }

    /// Calls into the port's endpoint; None if it has none, or has none any more.
    fn with_endpoint<R>(
        &mut self,
        port_id: u32,
        act: impl FnOnce(&mut dyn Endpoint) -> R,
    ) -> Option<R> {
        let port = self.tables.ports.get_mut(&port_id)?;
        match guarded(port.endpoint.as_mut()?.as_mut(), act) {
            Ok(done) => Some(done),
            Err(why) => {
                self.endpoint_failed(port_id, &why);
                None
            }
        }
    }

    /// Pushes requests to extensions, flushes the endpoints that got frames, answers barriers.
    pub fn flush(&mut self) {
        self.push_links();
        while let Some(port_id) = self.touched.pop() {
            self.with_endpoint(port_id, |endpoint| endpoint.flush());
        }
        if !self.barriers.is_empty() {
            self.answer_barriers();
        }
    }

    // -- what is to be seen --

    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    pub fn clock(&self) -> &Clock {
        &self.clock
    }

    pub fn connected_ports(&self) -> Vec<u32> {
        self.tables.connected.clone()
    }

    pub fn port_counters(&self, port_id: u32) -> Option<PortCounters> {
        self.tables
            .ports
            .get(&port_id)
            .map(|port| port.counters.clone())
    }

    pub fn switch_counters(&self) -> SwitchCounters {
        self.tables.counters.clone()
    }

    pub fn macs(&self) -> &MacTable {
        &self.tables.macs
    }

    pub fn flows(&mut self) -> &mut FlowCache {
        &mut self.tables.flows
    }

    pub(crate) fn wake_fd(&self, port_id: u32) -> Option<std::os::fd::RawFd> {
        self.tables
            .ports
            .get(&port_id)?
            .endpoint
            .as_ref()
            .map(|endpoint| endpoint.wake_fd())
    }

    // -- a frame's way --

    fn receive(&mut self, port_id: u32, frame: &FrameRef<'_>) {
        let Some(port) = self.tables.ports.get_mut(&port_id) else {
            return;
        };
        self.packet_id += 1;
        let mut packet = Packet::new(self.packet_id, port_id, frame);
        port.counters.rx.count(packet.length, Cast::of(frame.head));
        let drop = prepare(&mut packet, frame, port.mtu);
        self.sight(&packet, frame, port_id, false, None);
        match drop {
            Some(drop) => self.drop_frame(&packet, frame, port_id, false, &drop),
            None => self.decide(packet, frame),
        }
    }

    /// Finds the frame's program in the cache or walks the pipeline.
    pub(crate) fn decide(&mut self, packet: Packet, frame: &FrameRef<'_>) {
        if !self.holders.is_empty() {
            if let Some(&holder) = self.holders.get(&FlowKey::of(&packet)) {
                self.hold(holder, packet, frame);
                return;
            }
        }
        let now_ns = self.tables.now_ns;
        if packet.regular {
            let Tables {
                flows,
                counters,
                macs,
                ..
            } = &mut self.tables;
            if let Some(entry) = flows.lookup(&packet, now_ns, counters) {
                let program = entry.program.clone();
                if let Some(source) = program.source {
                    if now_ns.saturating_sub(entry.refreshed_ns) >= TICK_NS {
                        entry.refreshed_ns = now_ns;
                        macs.refresh(source, now_ns);
                    }
                }
                self.execute(&packet, frame, &program);
                return;
            }
        } else {
            self.tables.counters.flow_misses += 1;
        }
        let mut walk = Walk::new(false);
        match walk.resume(&packet, &mut self.tables, None) {
            Stop::Done(program) => {
                let program = Arc::new(program);
                self.publish(&packet, self.generation, &walk.recorder, &program);
                self.execute(&packet, frame, &program);
            }
            Stop::Ask { filter, out_port } => self.suspend(packet, frame, walk, filter, out_port),
        }
    }

    pub(crate) fn execute(&mut self, packet: &Packet, frame: &FrameRef<'_>, program: &Program) {
        if let Some(drop) = &program.drop {
            self.drop_frame(packet, frame, packet.in_port, false, drop);
            return;
        }
        self.tables.counters.flooded += u64::from(program.unknown);
        for destination in &program.destinations {
            self.output(packet, frame, destination);
        }
    }

    fn output(&mut self, packet: &Packet, frame: &FrameRef<'_>, destination: &Destination) {
        let port_id = destination.port_id;
        if let Some(drop) = self.tables.egress_policy(packet, port_id) {
            self.drop_frame(packet, frame, port_id, true, &drop);
            return;
        }
        if let Some(drop) = &destination.drop {
            self.drop_frame(packet, frame, port_id, true, drop);
            return;
        }
        self.sight(packet, frame, port_id, true, None);
        let Some(port) = self.tables.ports.get_mut(&port_id) else {
            return;
        };
        let Some(endpoint) = &mut port.endpoint else {
            return;
        };
        if !self.touched.contains(&port_id) {
            self.touched.push(port_id);
        }
        match guarded(endpoint.as_mut(), |endpoint| endpoint.transmit(frame)) {
            Ok(Ok(())) => port.counters.tx.count(packet.length, Cast::of(frame.head)),
            Ok(Err(reason)) => {
                let drop = Drop::new(reason, "the NIC did not take it");
                self.drop_frame(packet, frame, port_id, true, &drop);
            }
            Err(why) => {
                self.endpoint_failed(port_id, &why);
                let drop = Drop::new(DropReason::Disconnected, "the NIC failed");
                self.drop_frame(packet, frame, port_id, true, &drop);
            }
        }
    }

    pub(crate) fn drop_frame(
        &mut self,
        packet: &Packet,
        frame: &FrameRef<'_>,
        port_id: u32,
        outward: bool,
        drop: &Drop,
    ) {
        self.count_drop(port_id, outward, drop);
        self.sight(packet, frame, port_id, outward, Some(drop));
    }

    fn count_drop(&mut self, port_id: u32, outward: bool, drop: &Drop) {
        self.tables.counters.drops.count(drop.reason);
        if let Some(port) = self.tables.ports.get_mut(&port_id) {
            let direction = if outward {
                &mut port.counters.tx
            } else {
                &mut port.counters.rx
            };
            direction.count_drop(drop.reason, drop.by.is_some());
        }
    }

    /// Shows the frame to the capture taps; costs one look at an empty list when there are none.
    fn sight(
        &mut self,
        packet: &Packet,
        frame: &FrameRef<'_>,
        port_id: u32,
        outward: bool,
        drop: Option<&Drop>,
    ) {
        if self.taps.is_empty() {
            return;
        }
        self.taps.retain(|tap| !tap.is_closed());
        let timestamp_ns = self.clock.wall_ns();
        for tap in &self.taps {
            if !tap.wants(port_id, drop.is_some()) {
                continue;
            }
            let snaplen = if tap.filter.snaplen == 0 {
                usize::MAX
            } else {
                tap.filter.snaplen
            };
            tap.put(Sighting {
                timestamp_ns,
                port_id,
                outward,
                packet_id: packet.id,
                data: frame.to_vec(snaplen),
                original_length: packet.length,
                meta: frame.meta,
                drop: drop.map(|drop| (drop.reason, drop.by.clone(), drop.detail.to_string())),
            });
        }
    }

    /// Caches the program if all that it was made from still holds.
    pub(crate) fn publish(
        &mut self,
        packet: &Packet,
        generation: u64,
        recorder: &Recorder,
        program: &Arc<Program>,
    ) {
        let Tables {
            macs,
            flows,
            counters,
            now_ns,
            ..
        } = &mut self.tables;
        let holds = generation == self.generation
            && recorder
                .dependencies
                .iter()
                .all(|&(key, found)| macs.lookup(key) == found);
        if !holds || !recorder.cacheable || !packet.regular {
            counters.flows_refused += 1;
            return;
        }
        let mut depends_on: Vec<MacKey> =
            recorder.dependencies.iter().map(|&(key, _)| key).collect();
        depends_on.dedup();
        let what = Publication {
            mask: recorder.mask,
            program: program.clone(),
            depends_on,
            ttl_ns: recorder.ttl_ns,
        };
        flows.publish(packet, what, *now_ns, counters);
    }

    // -- capture and time --

    pub fn add_tap(&mut self, tap: Arc<Tap>) {
        self.taps.push(tap);
    }

    /// Deadlines and ages.
    pub fn run_timers(&mut self) {
        let now_ns = self.tell_time();
        self.fail_overdue(now_ns);
        if now_ns >= self.next_tick_ns {
            self.next_tick_ns = now_ns + TICK_NS;
            let keys = self.tables.macs.sweep(now_ns);
            self.tables.forget_macs(keys);
            self.tables.flows.sweep(now_ns);
            self.taps.retain(|tap| !tap.is_closed());
        }
        self.flush();
    }

    /// When `run_timers` has something to do next.
    pub fn next_due_ns(&self) -> u64 {
        let deadlines = self.links.values().filter_map(Link::next_deadline_ns);
        deadlines.fold(self.next_tick_ns, u64::min)
    }
}

/// The checks that every frame gets, cached or not; parses it.
pub(crate) fn prepare(packet: &mut Packet, frame: &FrameRef<'_>, mtu: usize) -> Option<Drop> {
    if packet.length < ETHERNET_HEADER {
        let detail = format!("{} bytes are less than an Ethernet header", packet.length);
        return Some(Drop::new(DropReason::InvalidPacket, detail));
    }
    if packet.length > MAX_FRAME {
        let detail = format!("{} bytes are more than any frame has", packet.length);
        return Some(Drop::new(DropReason::InvalidPacket, detail));
    }
    parse(packet, frame);
    if packet.l3_length > mtu && packet.mss == 0 {
        let detail = format!("{} bytes exceed the port's MTU of {mtu}", packet.l3_length);
        return Some(Drop::new(DropReason::InvalidPacket, detail));
    }
    None
}

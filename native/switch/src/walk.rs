//! The switch's pipeline, stage by stage. The twin of `vswitch/engine/python/pipeline.py`, which explains it.
//!
//! A [`Walk`] stops whenever an extension has to be consulted, and goes on with its answer.

use std::sync::Arc;

use crate::drops::DropReason;
use crate::fields::{self, close};
use crate::mac::{mac_key, MacKey};
use crate::parse::{is_group, Packet, BROADCAST};
use crate::program::{mac_text, Answer, Destination, Drop, Program, TraceStep};

/// An extension in the pipeline.
#[derive(Clone, Debug)]
pub struct Filter {
    pub id: u64,
    pub name: Arc<str>,
}

/// What a walk may ask of its datapath.
pub trait Surroundings {
    fn ingress(&self) -> &[Filter];
    /// In the order in which the egress pass consults them.
    fn egress(&self) -> &[Filter];
    fn port_name(&self, port_id: u32) -> String;
    /// Ids of the connected ports, ascending.
    fn connected(&self) -> &[u32];
    fn lookup(&self, key: MacKey) -> Option<u32>;
    /// False = the table is full.
    fn learn(&mut self, key: MacKey, port_id: u32) -> bool;
    /// Per-frame checks towards a port; repeated whenever a frame is sent there.
    fn egress_policy(&self, packet: &Packet, port_id: u32) -> Option<Drop>;
}

/// Notes everything that a walk looked at, and for a trace each stage's words.
#[derive(Debug)]
pub struct Recorder {
    pub tracing: bool,
    pub mask: u64,
    /// Rows of the MAC table that were looked up, and what was found.
    pub dependencies: Vec<(MacKey, Option<u32>)>,
    pub cacheable: bool,
    pub ttl_ns: u64,
    pub steps: Vec<TraceStep>,
}

impl Recorder {
    fn new(tracing: bool) -> Self {
        Recorder {
            tracing,
            mask: 0,
            dependencies: Vec::new(),
            cacheable: true,
            ttl_ns: 0,
            steps: Vec::new(),
        }
    }

    /// Takes over what an extension's verdict depends on.
    fn verdict(&mut self, answer: &Answer) {
        self.mask |= close(answer.fields & fields::ALL_BITS);
        if !answer.cacheable || answer.fields & fields::RAW != 0 {
            self.cacheable = false;
        }
        if answer.ttl_ns != 0 && (self.ttl_ns == 0 || answer.ttl_ns < self.ttl_ns) {
            self.ttl_ns = answer.ttl_ns;
        }
    }

    /// Notes a stage's words; `detail` is only made for a trace.
    pub fn step(
        &mut self,
        stage: &'static str,
        verdict: &'static str,
        fields: u64,
        port_id: Option<u32>,
        drop: Option<&Drop>,
        detail: impl FnOnce() -> String,
    ) {
        if self.tracing {
            self.steps.push(TraceStep {
                stage,
                verdict,
                detail: detail(),
                fields,
                port_id,
                reason: drop.map(|drop| drop.reason),
                by: drop.and_then(|drop| drop.by.clone()),
            });
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Stage {
    /// Index of the filter to ask next.
    FilterIn(usize),
    FilterOut {
        destination: usize,
        next: usize,
    },
}

/// Where a walk stopped.
#[derive(Debug)]
pub enum Stop {
    /// `out_port` `None` = the ingress pass.
    Ask {
        filter: u64,
        out_port: Option<u32>,
    },
    Done(Program),
}

/// A frame's way through the pipeline.
#[derive(Debug)]
pub struct Walk {
    stage: Stage,
    program: Program,
    pub recorder: Recorder,
}

impl Walk {
    pub fn new(tracing: bool) -> Self {
        Walk {
            stage: Stage::FilterIn(0),
            program: Program::default(),
            recorder: Recorder::new(tracing),
        }
    }

    /// Goes on, with the answer to what it stopped for, until the next stop.
    pub fn resume<S: Surroundings>(
        &mut self,
        packet: &Packet,
        around: &mut S,
        answer: Option<Answer>,
    ) -> Stop {
        let mut answer = answer;
        loop {
            match self.stage {
                Stage::FilterIn(next) => {
                    if let Some(answer) = answer.take() {
                        if let Some(filter) = next
                            .checked_sub(1)
                            .and_then(|asked| around.ingress().get(asked))
                        {
                            self.heard("filter in", filter, &answer, None);
                        }
                        if let Some(drop) = answer.drop {
                            return Stop::Done(Program::dropped(drop, None));
                        }
                    } else {
                        self.recorder.mask |= fields::IN_PORT;
                    }
                    if let Some(filter) = around.ingress().get(next) {
                        self.stage = Stage::FilterIn(next + 1);
                        return Stop::Ask {
                            filter: filter.id,
                            out_port: None,
                        };
                    }
                    if let Some(drop) = self.ingress_policy(packet) {
                        return Stop::Done(Program::dropped(drop, None));
                    }
                    self.program = self.turn(packet, around);
                    if self.program.drop.is_some() {
                        return Stop::Done(std::mem::take(&mut self.program));
                    }
                    self.stage = Stage::FilterOut {
                        destination: 0,
                        next: 0,
                    };
                }
                Stage::FilterOut { destination, next } => {
                    let Some(port_id) = self
                        .program
                        .destinations
                        .get(destination)
                        .map(|one| one.port_id)
                    else {
                        return Stop::Done(std::mem::take(&mut self.program));
                    };
                    let skip = Stage::FilterOut {
                        destination: destination + 1,
                        next: 0,
                    };
                    if let Some(answer) = answer.take() {
                        if let Some(filter) = next
                            .checked_sub(1)
                            .and_then(|asked| around.egress().get(asked))
                        {
                            self.heard("filter out", filter, &answer, Some(port_id));
                        }
                        if answer.drop.is_some() {
                            self.program.destinations[destination].drop = answer.drop;
                            self.stage = skip;
                            continue;
                        }
                    }
                    if next == 0 && !self.egress_policy(packet, around, port_id) {
                        self.stage = skip;
                        continue;
                    }
                    if let Some(filter) = around.egress().get(next) {
                        self.stage = Stage::FilterOut {
                            destination,
                            next: next + 1,
                        };
                        return Stop::Ask {
                            filter: filter.id,
                            out_port: Some(port_id),
                        };
                    }
                    self.stage = skip;
                }
            }
        }
    }

    fn heard(
        &mut self,
        stage: &'static str,
        filter: &Filter,
        answer: &Answer,
        port_id: Option<u32>,
    ) {
        self.recorder.verdict(answer);
        let (verdict, drop) = match &answer.drop {
            None => ("continue", None),
            Some(drop) => ("drop", Some(drop)),
        };
        self.recorder.step(
            stage,
            verdict,
            answer.fields,
            port_id,
            drop,
            || match drop {
                None => format!("extension {} allows it", filter.name),
                Some(drop) => format!("extension {}: {}", filter.name, drop.detail),
            },
        );
    }

    fn ingress_policy(&mut self, packet: &Packet) -> Option<Drop> {
        let read = fields::ETH_SRC | fields::ETH_DST;
        self.recorder.mask |= read;
        let drop = if is_group(packet.source) {
            let detail = format!(
                "source address {} is a group address",
                mac_text(packet.source)
            );
            Some(Drop::new(DropReason::InvalidSourceMac, detail))
        } else if packet.source == 0 {
            Some(Drop::new(
                DropReason::InvalidSourceMac,
                "source address is all zero",
            ))
        } else if packet.destination & !0xF == 0x0180_C200_0000 {
            let detail = format!(
                "{} is never forwarded by a bridge",
                mac_text(packet.destination)
            );
            Some(Drop::new(DropReason::BridgeReserved, detail))
        } else {
            None
        };
        let verdict = if drop.is_some() { "drop" } else { "continue" };
        self.recorder.step(
            "policy in",
            verdict,
            read,
            None,
            drop.as_ref(),
            || match &drop {
                None => "addresses are valid".into(),
                Some(drop) => drop.detail.to_string(),
            },
        );
        drop
    }

    fn turn<S: Surroundings>(&mut self, packet: &Packet, around: &mut S) -> Program {
        let recorder = &mut self.recorder;
        recorder.mask |= fields::VLAN_TCI;
        let source = mac_key(packet.vlan_id, packet.source);
        if recorder.tracing || around.learn(source, packet.in_port) {
            recorder.dependencies.push((source, Some(packet.in_port)));
        } else {
            recorder.cacheable = false; // it is to be learned as soon as there is room
        }
        let address = packet.destination;
        let read = fields::ETH_SRC | fields::ETH_DST | fields::VLAN_TCI;
        let nowhere = |recorder: &mut Recorder, reason, detail: String| {
            let drop = Drop::new(reason, detail);
            recorder.step("turn", "drop", read, None, Some(&drop), || {
                drop.detail.to_string()
            });
            Program::dropped(drop, Some(source))
        };
        let mut unknown = false;
        let kind = if is_group(address) {
            if address == BROADCAST {
                "broadcast"
            } else {
                "multicast"
            }
        } else {
            let key = mac_key(packet.vlan_id, address);
            let mut found = around.lookup(key);
            if recorder.tracing && key == source {
                found = Some(packet.in_port); // as it would be, had the frame been learned from
            }
            recorder.dependencies.push((key, found));
            if found == Some(packet.in_port) {
                let detail = format!("{} is behind the port it came from", mac_text(address));
                return nowhere(recorder, DropReason::UnicastNoDestination, detail);
            }
            if let Some(port_id) = found {
                recorder.step("turn", "forward", read, found, None, || {
                    format!(
                        "{} is behind {}",
                        mac_text(address),
                        around.port_name(port_id)
                    )
                });
                let destinations = vec![Destination {
                    port_id,
                    drop: None,
                }];
                return Program {
                    drop: None,
                    destinations,
                    unknown: false,
                    source: Some(source),
                };
            }
            unknown = true;
            "unknown"
        };
        let others = around
            .connected()
            .iter()
            .filter(|&&port_id| port_id != packet.in_port);
        let destinations: Vec<Destination> = others
            .map(|&port_id| Destination {
                port_id,
                drop: None,
            })
            .collect();
        if destinations.is_empty() {
            return if unknown {
                let detail = format!(
                    "{} is unknown, and no other port is connected",
                    mac_text(address)
                );
                nowhere(recorder, DropReason::UnicastNoDestination, detail)
            } else {
                let detail = format!("{kind}, and no other port is connected");
                nowhere(recorder, DropReason::BroadcastNoDestinations, detail)
            };
        }
        recorder.step("turn", "flood", read, None, None, || {
            format!(
                "{kind} address {}: {} ports",
                mac_text(address),
                destinations.len()
            )
        });
        Program {
            drop: None,
            destinations,
            unknown,
            source: Some(source),
        }
    }

    /// False = the frame does not get to the port.
    fn egress_policy<S: Surroundings>(
        &mut self,
        packet: &Packet,
        around: &mut S,
        port_id: u32,
    ) -> bool {
        let drop = around.egress_policy(packet, port_id);
        match &drop {
            None => {
                let detail = || "connected, fits the MTU".to_string();
                self.recorder
                    .step("policy out", "continue", 0, Some(port_id), None, detail);
                true
            }
            Some(drop) => {
                if drop.reason == DropReason::MtuMismatch && !around.egress().is_empty() {
                    // A shorter frame of the flow would have been shown to the filters.
                    self.recorder.cacheable = false;
                }
                let detail = || drop.detail.to_string();
                self.recorder
                    .step("policy out", "drop", 0, Some(port_id), Some(drop), detail);
                false
            }
        }
    }
}

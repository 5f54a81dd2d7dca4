//! The flow cache. The twin of `vswitch/engine/python/flows.py`: tuple space, bounded in masks and entries.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::counters::SwitchCounters;
use crate::fields::{key_mask, Key};
use crate::hash::FastMap;
use crate::limits::Limits;
use crate::mac::MacKey;
use crate::parse::Packet;
use crate::program::Program;

/// One cached decision.
pub struct FlowEntry {
    pub mask: u64,
    pub key: Key,
    pub program: Arc<Program>,
    depends_on: Vec<MacKey>,
    pub expires_ns: Option<u64>,
    pub used_ns: u64,
    pub refreshed_ns: u64,
    pub packets: u64,
    pub bytes: u64,
    serial: u64,
}

struct Table {
    mask: u64,
    bits: Key,
    entries: FastMap<Key, usize>,
}

pub struct FlowCache {
    limits: Limits,
    tables: Vec<Table>,
    slots: Vec<Option<FlowEntry>>,
    free: Vec<usize>,
    /// Slot and serial, oldest first; those whose serial is not the slot's any more are gone.
    by_age: VecDeque<(usize, u64)>,
    count: usize,
    by_mac: FastMap<MacKey, Vec<(usize, u64)>>,
    next_serial: u64,
}

/// A decision to keep.
pub struct Publication {
    pub mask: u64,
    pub program: Arc<Program>,
    pub depends_on: Vec<MacKey>,
    pub ttl_ns: u64,
}

impl FlowCache {
    pub fn new(limits: &Limits) -> Self {
        FlowCache {
            limits: *limits,
            tables: Vec::new(),
            slots: Vec::new(),
            free: Vec::new(),
            by_age: VecDeque::new(),
            count: 0,
            by_mac: FastMap::default(),
            next_serial: 1,
        }
    }

    /// The entry for the frame; counts the hit or miss.
    pub fn lookup(
        &mut self,
        packet: &Packet,
        now_ns: u64,
        counters: &mut SwitchCounters,
    ) -> Option<&mut FlowEntry> {
        let mut found = None;
        for table in &self.tables {
            if let Some(&slot) = table.entries.get(&packet.key.masked(&table.bits)) {
                found = Some(slot);
                break;
            }
        }
        if let Some(slot) = found {
            let expired = self
                .slots
                .get(slot)
                .and_then(Option::as_ref)
                .is_none_or(|entry| expired(entry, now_ns));
            if expired {
                self.remove(slot);
            } else if let Some(Some(entry)) = self.slots.get_mut(slot) {
                entry.used_ns = now_ns;
                entry.packets += 1;
                entry.bytes += packet.length as u64;
                counters.flow_hits += 1;
                return Some(entry);
            }
        }
        counters.flow_misses += 1;
        None
    }

    /// Keeps the decision; refuses another mask when there are as many as allowed.
    pub fn publish(
        &mut self,
        packet: &Packet,
        what: Publication,
        now_ns: u64,
        counters: &mut SwitchCounters,
    ) {
        let bits = key_mask(what.mask);
        let key = packet.key.masked(&bits);
        match self.tables.iter().find(|table| table.mask == what.mask) {
            None if self.tables.len() >= self.limits.flow_masks => {
                counters.flows_refused += 1;
                return;
            }
            None => self.tables.push(Table {
                mask: what.mask,
                bits,
                entries: FastMap::default(),
            }),
            Some(_) => {}
        }
        let old = self
            .tables
            .iter()
            .find(|table| table.mask == what.mask)
            .and_then(|table| table.entries.get(&key));
        if let Some(&slot) = old {
            self.remove(slot);
        } else if self.count >= self.limits.flow_entries {
            if let Some(slot) = self.oldest() {
                self.remove(slot);
                counters.flows_evicted += 1;
            }
        }
        let serial = self.next_serial;
        self.next_serial += 1;
        let entry = FlowEntry {
            mask: what.mask,
            key,
            program: what.program,
            depends_on: what.depends_on,
            expires_ns: (what.ttl_ns != 0).then(|| now_ns.saturating_add(what.ttl_ns)),
            used_ns: now_ns,
            refreshed_ns: now_ns,
            packets: 1,
            bytes: packet.length as u64,
            serial,
        };
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        });
        for mac in &entry.depends_on {
            let dependents = self.by_mac.entry(*mac).or_default();
            // Those of removed entries are cleared away when they may be the majority.
            if dependents.len() > 2 * self.count + 64 {
                let slots = &self.slots;
                dependents.retain(|&(slot, serial)| is(slots, slot, serial));
            }
            dependents.push((slot, serial));
        }
        self.slots[slot] = Some(entry);
        // A guest chooses the addresses: rows that nothing depends on any more must not pile up until the next sweep.
        if self.by_mac.len() > 4 * self.limits.flow_entries + 64 {
            let slots = &self.slots;
            self.by_mac.retain(|_, dependents| {
                dependents.retain(|&(slot, serial)| is(slots, slot, serial));
                !dependents.is_empty()
            });
        }
        self.by_age.push_back((slot, serial));
        self.count += 1;
        counters.flows_published += 1;
        let position = self.tables.iter().position(|table| table.mask == what.mask);
        let position = position.unwrap_or_else(|| {
            self.tables.push(Table {
                mask: what.mask,
                bits,
                entries: FastMap::default(),
            });
            self.tables.len() - 1
        });
        self.tables[position].entries.insert(key, slot);
    }

    /// Drops every entry that depends on this row of the MAC table.
    pub fn invalidate(&mut self, key: MacKey) {
        for (slot, serial) in self.by_mac.remove(&key).unwrap_or_default() {
            if self.is(slot, serial) {
                self.remove(slot);
            }
        }
    }

    /// Drops what expired or was not hit for the idle time.
    pub fn sweep(&mut self, now_ns: u64) {
        let idle_ns = self.limits.flow_idle_ns;
        for slot in 0..self.slots.len() {
            let Some(entry) = &self.slots[slot] else {
                continue;
            };
            if expired(entry, now_ns) || now_ns.saturating_sub(entry.used_ns) >= idle_ns {
                self.remove(slot);
            }
        }
        self.by_age
            .retain(|&(slot, serial)| is(&self.slots, slot, serial));
        self.by_mac.retain(|_, dependents| {
            dependents.retain(|&(slot, serial)| is(&self.slots, slot, serial));
            !dependents.is_empty()
        });
    }

    pub fn flush(&mut self) {
        self.tables.clear();
        self.slots.clear();
        self.free.clear();
        self.by_age.clear();
        self.by_mac.clear();
        self.count = 0;
    }

    /// All entries, oldest first.
    pub fn entries(&self) -> impl Iterator<Item = &FlowEntry> {
        self.by_age.iter().filter_map(|&(slot, serial)| {
            self.slots
                .get(slot)
                .and_then(Option::as_ref)
                .filter(|entry| entry.serial == serial)
        })
    }

    fn is(&self, slot: usize, serial: u64) -> bool {
        is(&self.slots, slot, serial)
    }

    fn oldest(&mut self) -> Option<usize> {
        while let Some((slot, serial)) = self.by_age.pop_front() {
            if self.is(slot, serial) {
                return Some(slot);
            }
        }
        None
    }

    fn remove(&mut self, slot: usize) {
        let Some(entry) = self.slots.get_mut(slot).and_then(Option::take) else {
            return;
        };
        self.free.push(slot);
        self.count -= 1;
        if let Some(position) = self
            .tables
            .iter()
            .position(|table| table.mask == entry.mask)
        {
            self.tables[position].entries.remove(&entry.key);
            if self.tables[position].entries.is_empty() {
                self.tables.remove(position);
            }
        }
        // Stale rows of `by_age` and `by_mac` are harmless, but they must not grow without bound.
        if self.by_age.len() > 2 * self.count + 1024 {
            let slots = &self.slots;
            self.by_age
                .retain(|&(slot, serial)| is(slots, slot, serial));
        }
    }
}

fn is(slots: &[Option<FlowEntry>], slot: usize, serial: u64) -> bool {
    slots
        .get(slot)
        .and_then(Option::as_ref)
        .is_some_and(|entry| entry.serial == serial)
}

fn expired(entry: &FlowEntry, now_ns: u64) -> bool {
    entry.expires_ns.is_some_and(|expires| now_ns >= expires)
}

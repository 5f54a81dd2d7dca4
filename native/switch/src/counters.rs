//! Counters of ports and of the whole datapath; the worker is their only writer, readers get copies.
//!
//! `vswitch.engine.PortCounters` and `SwitchCounters` say what each one counts.

use crate::drops::DropReason;

const REASONS: usize = DropReason::ALL.len();

/// One counter per drop reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Drops([u64; REASONS]);

impl Default for Drops {
    fn default() -> Self {
        Drops([0; REASONS])
    }
}

impl Drops {
    pub fn count(&mut self, reason: DropReason) {
        if let Some(counter) = self.0.get_mut(reason.index()) {
            *counter += 1;
        }
    }

    /// Reasons that occurred, in the order of their codes.
    pub fn nonzero(&self) -> Vec<(u16, u64)> {
        let pairs = DropReason::ALL.iter().zip(self.0);
        pairs
            .filter(|(_, count)| *count != 0)
            .map(|(reason, count)| (reason.code(), count))
            .collect()
    }
}

/// One direction of a port: "rx" is what the switch received from the NIC, "tx" what it delivered.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DirectionCounters {
    pub packets: u64,
    pub bytes: u64,
    pub unicast: u64,
    pub multicast: u64,
    pub broadcast: u64,
    pub dropped: u64,
    pub extension_dropped: u64,
    pub drops: Drops,
}

impl DirectionCounters {
    pub fn count(&mut self, length: usize, cast: Cast) {
        self.packets += 1;
        self.bytes += length as u64;
        match cast {
            Cast::Unicast => self.unicast += 1,
            Cast::Multicast => self.multicast += 1,
            Cast::Broadcast => self.broadcast += 1,
        }
    }

    pub fn count_drop(&mut self, reason: DropReason, by_extension: bool) {
        self.dropped += 1;
        self.extension_dropped += u64::from(by_extension);
        self.drops.count(reason);
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cast {
    Unicast,
    Multicast,
    Broadcast,
}

impl Cast {
    /// By the destination address at the start of `head`; a frame without one counts as unicast.
    pub fn of(head: &[u8]) -> Cast {
        match head.get(..6) {
            Some(address) if address[0] & 1 == 0 => Cast::Unicast,
            Some(address) if address.iter().all(|&byte| byte == 0xFF) => Cast::Broadcast,
            Some(_) => Cast::Multicast,
            None => Cast::Unicast,
        }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PortCounters {
    pub rx: DirectionCounters,
    pub tx: DirectionCounters,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SwitchCounters {
    pub flooded: u64,
    pub macs_learned: u64,
    pub macs_moved: u64,
    pub macs_purged: u64,
    pub macs_refused: u64,
    pub flow_hits: u64,
    pub flow_misses: u64,
    pub flows_published: u64,
    pub flows_evicted: u64,
    pub flows_refused: u64,
    pub upcalls: u64,
    pub upcall_failures: u64,
    /// Endpoints whose code panicked.
    pub endpoints_failed: u64,
    pub drops: Drops,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExtensionCounters {
    pub upcalls: u64,
    pub allowed: u64,
    pub dropped: u64,
    pub errors: u64,
    pub failed: bool,
    pub why: String,
}

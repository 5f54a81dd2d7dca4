//! The MAC table. The twin of `vswitch/engine/python/mac.py`.

use crate::hash::FastMap;
use crate::limits::Limits;

/// VLAN id in the upper 16 bits, address in the lower 48.
pub type MacKey = u64;

pub fn mac_key(vlan_id: u16, address: u64) -> MacKey {
    u64::from(vlan_id) << 48 | address
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MacRow {
    pub port_id: u32,
    pub seen_ns: u64,
}

/// What learning changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Learned {
    Known,
    New,
    Moved,
    /// The table is full.
    Refused,
}

pub struct MacTable {
    rows: FastMap<MacKey, MacRow>,
    limit: usize,
    age_ns: u64,
}

impl MacTable {
    pub fn new(limits: &Limits) -> Self {
        MacTable {
            rows: FastMap::default(),
            limit: limits.mac_entries,
            age_ns: limits.mac_age_ns,
        }
    }

    pub fn lookup(&self, key: MacKey) -> Option<u32> {
        self.rows.get(&key).map(|row| row.port_id)
    }

    pub fn learn(&mut self, key: MacKey, port_id: u32, now_ns: u64) -> Learned {
        if let Some(row) = self.rows.get_mut(&key) {
            row.seen_ns = now_ns;
            if row.port_id == port_id {
                return Learned::Known;
            }
            row.port_id = port_id;
            return Learned::Moved;
        }
        if self.rows.len() >= self.limit {
            return Learned::Refused;
        }
        self.rows.insert(
            key,
            MacRow {
                port_id,
                seen_ns: now_ns,
            },
        );
        Learned::New
    }

    pub fn refresh(&mut self, key: MacKey, now_ns: u64) {
        if let Some(row) = self.rows.get_mut(&key) {
            row.seen_ns = now_ns;
        }
    }

    /// Purges what was not seen for the table's age; returns the keys.
    pub fn sweep(&mut self, now_ns: u64) -> Vec<MacKey> {
        let age_ns = self.age_ns;
        self.purge(|row| now_ns.saturating_sub(row.seen_ns) >= age_ns)
    }

    /// Purges all that was learned from a port; returns the keys.
    pub fn forget_port(&mut self, port_id: u32) -> Vec<MacKey> {
        self.purge(|row| row.port_id == port_id)
    }

    /// The table, ordered by VLAN and address.
    pub fn rows(&self) -> Vec<(MacKey, MacRow)> {
        let mut rows: Vec<_> = self.rows.iter().map(|(key, row)| (*key, *row)).collect();
        rows.sort_unstable_by_key(|(key, _)| *key);
        rows
    }

    fn purge(&mut self, goes: impl Fn(&MacRow) -> bool) -> Vec<MacKey> {
        let keys: Vec<MacKey> = self
            .rows
            .iter()
            .filter(|(_, row)| goes(row))
            .map(|(key, _)| *key)
            .collect();
        for key in &keys {
            self.rows.remove(key);
        }
        keys
    }
}

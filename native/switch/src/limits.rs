//! Bounds of one datapath; `vswitch.engine.Limits` has the defaults and says what each one bounds.

#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub mac_entries: usize,
    pub mac_age_ns: u64,
    pub flow_entries: usize,
    pub flow_masks: usize,
    pub flow_idle_ns: u64,
    pub held_per_flow: usize,
    pub held_total: usize,
    pub upcalls_per_port: usize,
    pub upcall_deadline_ns: u64,
    pub capture_frames: usize,
    pub capture_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            mac_entries: 4096,
            mac_age_ns: 300_000_000_000,
            flow_entries: 16384,
            flow_masks: 32,
            flow_idle_ns: 10_000_000_000,
            held_per_flow: 64,
            held_total: 4096,
            upcalls_per_port: 256,
            upcall_deadline_ns: 1_000_000_000,
            capture_frames: 4096,
            capture_bytes: 16 << 20,
        }
    }
}

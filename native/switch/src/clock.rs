//! The time that ages, deadlines and captures go by: the system's, or a test's.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

#[derive(Clone)]
pub enum Clock {
    /// Nanoseconds since it was made.
    System(Instant),
    /// Stands still until somebody moves it.
    Manual(Arc<AtomicU64>),
}

impl Clock {
    pub fn system() -> Self {
        Clock::System(Instant::now())
    }

    pub fn manual() -> Self {
        Clock::Manual(Arc::new(AtomicU64::new(0)))
    }

    pub fn is_manual(&self) -> bool {
        matches!(self, Clock::Manual(_))
    }

    /// Moves a manual clock; the system's goes by itself.
    pub fn advance(&self, ns: u64) {
        if let Clock::Manual(now) = self {
            now.fetch_add(ns, Ordering::Relaxed);
        }
    }

    pub fn now_ns(&self) -> u64 {
        match self {
            Clock::System(start) => u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX),
            Clock::Manual(now) => now.load(Ordering::Relaxed),
        }
    }

    /// Nanoseconds since the Unix epoch; of a manual clock, its own time.
    pub fn wall_ns(&self) -> u64 {
        match self {
            Clock::System(_) => {
                let since = SystemTime::now()
                    .duration_since(UNIX_EPOCH)
                    .unwrap_or_default();
                u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
            }
            Clock::Manual(_) => self.now_ns(),
        }
    }
}

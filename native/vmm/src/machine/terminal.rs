//! The console's place in the machine's event loop.

use std::os::fd::AsRawFd;
use std::time::Duration;

use super::{Machine, CONSOLE_CLIENT, CONSOLE_LISTENER, READ, WRITE};
use crate::error::Result;

const HANG_UP: u32 = libc::EPOLLRDHUP as u32;

/// When a slow log or a full serial queue is looked at again: soon while it moves, seldom while it stands still, since a guest
/// that never reads its serial port must not keep a processor busy.
#[derive(Default)]
pub(super) struct Patience {
    /// What was left at the last look, and how often it has been the same since.
    left: (bool, usize),
    times: u32,
}

impl Patience {
    const SHORTEST: Duration = Duration::from_millis(20);
    /// 640 ms.
    const MOST_DOUBLINGS: u32 = 5;

    /// How long until the next look; None when nothing is left.
    pub(super) fn next(&mut self, log_waits: bool, typed: usize) -> Option<Duration> {
        let left = (log_waits, typed);
        if left == (false, 0) {
            *self = Self::default();
            return None;
        }
        self.times = if left == self.left { self.times + 1 } else { 0 };
        self.times = self.times.min(Self::MOST_DOUBLINGS);
        self.left = left;
        Some(Self::SHORTEST * 2u32.pow(self.times))
    }
}

impl Machine {
    /// The client typed something, or has gone.
    pub(super) fn serve_client(&mut self, what: u32) {
        if self.console.wants_input() {
            self.console.receive();
        } else if what & (HANG_UP | (libc::EPOLLHUP | libc::EPOLLERR) as u32) != 0 {
            // Whatever it typed last has no reader any more that could wait for the guest.
            self.console.hang_up();
        }
    }

    /// Moves the console's bytes; gives when somebody must be looked at again.
    pub(super) fn serve_console(&mut self) -> Result<Option<Duration>> {
        let log_waits = self.console.pass_on(&self.output);
        let typed = self.console.type_in(&self.ports);
        let input = if self.console.wants_input() { READ } else { 0 };
        let behind = self.console.client_is_behind();
        let output = if behind { WRITE } else { 0 };
        let wanted = self
            .console
            .client()
            .map(|fd| (fd, HANG_UP | input | output));
        if wanted != self.client {
            // A client that has gone left epoll when its descriptor was closed.
            if let Some((fd, events)) = wanted {
                let before = self.client.filter(|(old, _)| *old == fd);
                self.watch(
                    fd,
                    CONSOLE_CLIENT,
                    before.map_or(0, |(_, events)| events),
                    events,
                )?;
            }
            self.client = wanted;
        }
        // The next one waits in the backlog while there is a client.
        let listening = if wanted.is_some() { 0 } else { READ };
        let listener = self.console.listener().as_raw_fd();
        self.watch(listener, CONSOLE_LISTENER, self.listening, listening)?;
        self.listening = listening;
        Ok(self.patience.next(log_waits, typed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_moves_is_looked_at_soon_and_what_stands_still_seldom() {
        let mut patience = Patience::default();
        assert_eq!(patience.next(false, 0), None);
        assert_eq!(patience.next(false, 9), Some(Patience::SHORTEST));
        assert_eq!(patience.next(false, 9), Some(Patience::SHORTEST * 2));
        let longest = (0..100).filter_map(|_| patience.next(false, 9)).max();
        assert_eq!(longest, Some(Patience::SHORTEST * 32));
        assert_eq!(patience.next(false, 8), Some(Patience::SHORTEST));
        assert_eq!(patience.next(true, 8), Some(Patience::SHORTEST));
        assert_eq!(patience.next(false, 0), None);
    }
}

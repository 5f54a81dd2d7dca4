//! The console's place in the machine's event loop.

use std::os::fd::AsRawFd;

use super::{Machine, CONSOLE_CLIENT, CONSOLE_LISTENER, READ};
use crate::error::Result;

const HANG_UP: u32 = libc::EPOLLRDHUP as u32;

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

    /// Moves the console's bytes; true when somebody must be looked at again soon.
    pub(super) fn serve_console(&mut self) -> Result<bool> {
        let slow = self.console.pass_on(&self.output);
        let full = self.console.type_in(&self.ports);
        let input = if self.console.wants_input() { READ } else { 0 };
        let wanted = self.console.client().map(|fd| (fd, HANG_UP | input));
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
        Ok(slow || full)
    }
}

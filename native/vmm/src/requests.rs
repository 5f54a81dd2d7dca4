//! The way from virtual processors to the host: requests with their answers, and end-of-message notices.
//!
//! Any thread sends; nobody waits for the socket. A virtual processor that made a request waits for its answer, so each has at
//! most one outstanding, and what queues here is bounded by processors and message slots.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use vmm_sys_util::eventfd::{EventFd, EFD_NONBLOCK};
use vswitch_door::sys;
use vswitch_wire::door::DoorMessage;

use crate::door::Answer;
use crate::error::{Context, Result};

/// How long a request waits for a door that is not open before it is given up.
const PATIENCE: Duration = Duration::from_millis(100);

#[derive(Default)]
struct State {
    socket: Option<Arc<OwnedFd>>,
    sequence: u32,
    /// None: not answered yet.
    answers: HashMap<u32, Option<Answer>>,
    backlog: VecDeque<Vec<u8>>,
    broken: bool,
}

/// Shared by the machine and its virtual processors.
pub struct Requests {
    state: Mutex<State>,
    changed: Condvar,
    wake: EventFd,
}

impl State {
    fn send(&mut self, frame: Vec<u8>, fds: &[OwnedFd]) {
        let Some(socket) = &self.socket else { return };
        if self.backlog.is_empty() {
            match sys::send(socket.as_raw_fd(), &frame, fds) {
                Ok(()) => return,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && fds.is_empty() => {}
                Err(_) => {
                    self.broken = true;
                    return;
                }
            }
        }
        self.backlog.push_back(frame);
    }

    fn next(&mut self) -> u32 {
        self.sequence = self.sequence.checked_add(1).unwrap_or(1);
        self.sequence
    }
}

impl Requests {
    pub fn new() -> Result<Self> {
        Ok(Self {
            state: Mutex::default(),
            changed: Condvar::new(),
            wake: EventFd::new(EFD_NONBLOCK).context("door")?,
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Readable when the socket needs attention: it did not take a frame, or broke.
    pub fn event(&self) -> &EventFd {
        &self.wake
    }

    /// Requests go here from now on.
    pub fn open(&self, socket: Arc<OwnedFd>) {
        self.state().socket = Some(socket);
        self.changed.notify_all();
    }

    /// Whether there is a greeted door.
    pub fn is_open(&self) -> bool {
        self.state().socket.is_some()
    }

    /// The door is lost: whoever waits for an answer gets none.
    pub fn close(&self) {
        let mut state = self.state();
        *state = State {
            sequence: state.sequence,
            ..State::default()
        };
        drop(state);
        self.changed.notify_all();
    }

    /// Sends a frame that has no answer, or whose answer nobody waits for.
    pub fn send(&self, message: &DoorMessage<'_>, sequence: u32, fds: &[OwnedFd]) {
        if let Ok(frame) = message.encode(sequence) {
            self.send_frame(frame, fds);
        }
    }

    /// As `send`, of a frame that is encoded already.
    pub fn send_frame(&self, frame: Vec<u8>, fds: &[OwnedFd]) {
        let mut state = self.state();
        state.send(frame, fds);
        self.signal(&state);
    }

    /// Sends a request; gives its number. The answer is dropped when it comes.
    pub fn request(&self, message: &DoorMessage<'_>) -> u32 {
        let mut state = self.state();
        let sequence = state.next();
        if let Ok(frame) = message.encode(sequence) {
            state.send(frame, &[]);
        }
        self.signal(&state);
        sequence
    }

    /// Sends a request and waits for its answer; None when there is no door, or it is lost meanwhile.
    pub fn ask(&self, message: &DoorMessage<'_>) -> Option<Answer> {
        let mut state = self.state();
        if state.socket.is_none() {
            state = self
                .changed
                .wait_timeout_while(state, PATIENCE, |state| state.socket.is_none())
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        state.socket.as_ref()?;
        let sequence = state.next();
        state.answers.insert(sequence, None);
        state.send(message.encode(sequence).ok()?, &[]);
        self.signal(&state);
        loop {
            match state.answers.get(&sequence) {
                Some(Some(_)) => return state.answers.remove(&sequence).flatten(),
                Some(None) => {}
                None => return None,
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn signal(&self, state: &State) {
        if state.broken || !state.backlog.is_empty() {
            let _ = self.wake.write(1);
        }
    }

    /// An answer came; one that nobody waits for is dropped.
    pub fn answered(&self, sequence: u32, answer: Answer) {
        if let Some(place) = self.state().answers.get_mut(&sequence) {
            *place = Some(answer);
        }
        self.changed.notify_all();
    }

    /// Sends what waits. Some(true): all of it went; Some(false): the socket is full; None: it broke.
    pub fn flush(&self) -> Option<bool> {
        let mut state = self.state();
        let waiting = std::mem::take(&mut state.backlog);
        for frame in waiting {
            state.send(frame, &[]);
        }
        (!state.broken).then_some(state.backlog.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::FromRawFd;
    use vswitch_wire::door::Hypercall;

    fn pair() -> (OwnedFd, OwnedFd) {
        let mut fds = [0; 2];
        // SAFETY: an array of two, as socketpair wants.
        let made = unsafe {
            libc::socketpair(
                libc::AF_UNIX,
                libc::SOCK_SEQPACKET | libc::SOCK_NONBLOCK,
                0,
                fds.as_mut_ptr(),
            )
        };
        assert_eq!(made, 0);
        // SAFETY: two new descriptors of our own.
        unsafe { (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1])) }
    }

    const CALL: DoorMessage<'_> = DoorMessage::Hypercall(Hypercall {
        vp: 0,
        rcx: 0x5C,
        rdx: 0,
        r8: 0,
        xmm: [0; 96],
    });

    #[test]
    fn a_request_gets_its_own_answer() {
        let requests = Arc::new(Requests::new().unwrap());
        let (ours, host) = pair();
        requests.open(Arc::new(ours));
        let asking = Arc::clone(&requests);
        let asked = std::thread::spawn(move || asking.ask(&CALL));
        let mut buffer = [0; 256];
        let frame = loop {
            match sys::receive(host.as_raw_fd(), &mut buffer, 0) {
                Ok(received) => break &buffer[..received.length],
                Err(_) => std::thread::yield_now(),
            }
        };
        let (sequence, message) = DoorMessage::parse(frame).unwrap();
        assert_eq!(message, CALL);
        requests.answered(sequence + 1, Answer::Hypercall(1));
        requests.answered(sequence, Answer::Hypercall(7));
        assert_eq!(asked.join().unwrap(), Some(Answer::Hypercall(7)));
    }

    #[test]
    fn without_a_door_there_is_no_answer_and_losing_it_frees_who_waits() {
        let requests = Arc::new(Requests::new().unwrap());
        assert_eq!(requests.ask(&CALL), None);
        let (ours, _host) = pair();
        requests.open(Arc::new(ours));
        let asking = Arc::clone(&requests);
        let asked = std::thread::spawn(move || asking.ask(&CALL));
        while requests.state().answers.is_empty() {
            std::thread::yield_now();
        }
        requests.close();
        assert_eq!(asked.join().unwrap(), None);
    }

    #[test]
    fn what_the_socket_does_not_take_goes_later() {
        let requests = Requests::new().unwrap();
        let (ours, host) = pair();
        requests.open(Arc::new(ours));
        for _ in 0..2000 {
            requests.send(&DoorMessage::Eom { vp: 0, sint: 2 }, 0, &[]);
        }
        let mut buffer = [0; 256];
        let mut count = 0;
        loop {
            while sys::receive(host.as_raw_fd(), &mut buffer, 0).is_ok() {
                count += 1;
            }
            if requests.flush() == Some(true) && count == 2000 {
                break;
            }
            assert!(count <= 2000);
        }
        drop(host);
        requests.send(&CALL, 1, &[]);
        assert_eq!(requests.flush(), None);
    }
}

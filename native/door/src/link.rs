//! One door: its socket, what waits to be sent, what it may still ask.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use vswitch_wire::door::{self, DoorMessage};
use vswitch_wire::WireError;

use crate::sys::{self, Epoll};
use crate::{Event, Quotas};

/// The longest frame a guest may send: a header, two words, a text.
pub(crate) const GUEST_FRAME_LIMIT: usize = door::HEADER_SIZE + 8 + door::MAX_TEXT;

/// Tokens at a rate, up to a burst.
struct Bucket {
    rate: f64,
    burst: f64,
    tokens: f64,
    at: Instant,
}

impl Bucket {
    fn new(rate: u32, burst: u32, now: Instant) -> Self {
        Self {
            rate: f64::from(rate),
            burst: f64::from(burst),
            tokens: f64::from(burst),
            at: now,
        }
    }

    /// Takes a token, or says when there will be one.
    fn take(&mut self, now: Instant) -> Option<Instant> {
        let passed = now.saturating_duration_since(self.at).as_secs_f64();
        self.tokens = (self.tokens + passed * self.rate).min(self.burst);
        self.at = now;
        if self.tokens >= 1.0 {
            self.tokens -= 1.0;
            return None;
        }
        // At least a millisecond, so that a flood costs wake-ups at that rate and no more.
        Some(
            now + Duration::from_secs_f64((1.0 - self.tokens) / self.rate)
                .max(Duration::from_millis(1)),
        )
    }

    /// Nothing was there to be taken.
    fn put_back(&mut self) {
        self.tokens += 1.0;
    }
}

/// Why a door ends: for the owner, and as an ERROR frame's code for the guest where there is one.
pub(crate) struct End {
    pub(crate) reason: String,
    pub(crate) code: Option<u32>,
}

impl End {
    fn gone(error: &io::Error) -> Self {
        Self {
            reason: format!("the guest's side is gone ({error})"),
            code: None,
        }
    }

    fn malformed(reason: impl Into<String>) -> Self {
        Self {
            reason: reason.into(),
            code: Some(door::ERROR_MALFORMED),
        }
    }
}

pub(crate) struct Link {
    pub(crate) number: u64,
    socket: OwnedFd,
    quotas: Quotas,
    backlog: VecDeque<(Vec<u8>, Vec<OwnedFd>)>,
    bucket: Bucket,
    pub(crate) throttled_until: Option<Instant>,
    pub(crate) held: bool,
    pub(crate) fds_expected: usize,
    /// Frames handed over and not yet worked off by the owner.
    pub(crate) unread: usize,
    registered: u32,
}

impl Link {
    pub(crate) fn new(number: u64, socket: OwnedFd, quotas: Quotas) -> Self {
        let bucket = Bucket::new(
            quotas.frames_per_second,
            quotas.frames_burst,
            Instant::now(),
        );
        Self {
            number,
            socket,
            quotas,
            backlog: VecDeque::new(),
            bucket,
            throttled_until: None,
            held: false,
            fds_expected: 0,
            unread: 0,
            registered: 0,
        }
    }

    fn reads(&self) -> bool {
        !self.held
            && self.throttled_until.is_none()
            && self.backlog.len() < self.quotas.send_backlog
            && self.unread < self.quotas.frames_per_turn * 2
    }

    /// Registers what this door now waits for.
    pub(crate) fn register(&mut self, epoll: &Epoll) -> Result<(), End> {
        let mut events = 0;
        if self.reads() {
            events |= libc::EPOLLIN as u32;
        }
        if !self.backlog.is_empty() {
            events |= libc::EPOLLOUT as u32;
        }
        epoll
            .update(
                self.socket.as_raw_fd(),
                self.number,
                self.registered,
                events,
            )
            .map_err(|error| End::gone(&error))?;
        self.registered = events;
        Ok(())
    }

    /// Takes the door out of the epoll set.
    pub(crate) fn unregister(&mut self, epoll: &Epoll) {
        let _ = epoll.update(self.socket.as_raw_fd(), self.number, self.registered, 0);
        self.registered = 0;
    }

    /// Sends now if the socket takes it, else queues.
    pub(crate) fn send(&mut self, frame: Vec<u8>, fds: Vec<OwnedFd>) -> Result<(), End> {
        if self.backlog.is_empty() && self.try_send(&frame, &fds)? {
            return Ok(());
        }
        if self.backlog.len() >= self.quotas.send_limit {
            let reason = format!("the guest has not taken {} frames", self.backlog.len());
            return Err(End { reason, code: None });
        }
        self.backlog.push_back((frame, fds));
        Ok(())
    }

    fn try_send(&self, frame: &[u8], fds: &[OwnedFd]) -> Result<bool, End> {
        match sys::send(self.socket.as_raw_fd(), frame, fds) {
            Ok(()) => Ok(true),
            Err(error) if retry(&error) => Ok(false),
            Err(error) => Err(End::gone(&error)),
        }
    }

    /// Sends what waits, as far as the socket takes it.
    pub(crate) fn flush(&mut self) -> Result<(), End> {
        while let Some((frame, fds)) = self.backlog.front() {
            if !self.try_send(frame, fds)? {
                break;
            }
            self.backlog.pop_front();
        }
        Ok(())
    }

    /// The last frame, if the socket takes it at once and nothing waits before it.
    pub(crate) fn send_error(&self, frame: &[u8]) {
        if self.backlog.is_empty() {
            let _ = self.try_send(frame, &[]);
        }
    }

    /// One turn: at most `frames_per_turn` frames, each checked before it is handed over.
    pub(crate) fn read(&mut self, events: &mut Vec<Event>) -> Result<(), End> {
        let mut buffer = [0u8; GUEST_FRAME_LIMIT];
        for _ in 0..self.quotas.frames_per_turn {
            if !self.reads() {
                break;
            }
            self.throttled_until = self.bucket.take(Instant::now());
            if self.throttled_until.is_some() {
                break;
            }
            let received =
                match sys::receive(self.socket.as_raw_fd(), &mut buffer, self.fds_expected) {
                    Ok(received) => received,
                    Err(error) if retry(&error) => {
                        self.bucket.put_back();
                        break;
                    }
                    Err(error) => return Err(End::gone(&error)),
                };
            if received.length == 0 {
                return Err(End {
                    reason: "the guest's side closed the door".into(),
                    code: None,
                });
            }
            if received.truncated {
                let reason = format!(
                    "door frame: longer than the {GUEST_FRAME_LIMIT} bytes a guest may send"
                );
                return Err(End::malformed(reason));
            }
            if received.fds_discarded || received.fds.len() > self.fds_expected {
                return Err(End::malformed(
                    "door frame: carries descriptors that its type does not have",
                ));
            }
            let data = buffer.get(..received.length).unwrap_or_default();
            check(data)?;
            self.fds_expected = 0;
            self.unread += 1;
            events.push(Event::Frame {
                door: self.number,
                data: data.to_vec(),
                fds: received.fds,
            });
        }
        Ok(())
    }
}

fn retry(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}

/// A whole, well-formed frame that goes from guest to host; the guest's own ERROR ends the door.
fn check(frame: &[u8]) -> Result<(), End> {
    match DoorMessage::parse(frame) {
        Ok((_, message)) => match message {
            DoorMessage::HelloAck { .. }
            | DoorMessage::Hypercall(_)
            | DoorMessage::MsrWrite { .. }
            | DoorMessage::MsrRead { .. }
            | DoorMessage::Eom { .. }
            | DoorMessage::Parked
            | DoorMessage::Reset
            | DoorMessage::Configured { .. }
            | DoorMessage::ExecStarted { .. }
            | DoorMessage::ExecExit { .. } => Ok(()),
            DoorMessage::DoorError { code, text } => {
                let reason = format!("the guest's side reported error {code}: {text}");
                Err(End { reason, code: None })
            }
            other => Err(End::malformed(format!(
                "door frame type {:#x}: this frame goes from host to guest only",
                other.kind()
            ))),
        },
        Err(WireError::Unknown { number, .. }) if (0x18..0x20).contains(&number) => Err(End {
            reason: format!(
                "door frame type {number:#x}: intercepts are reserved and not served by door version 1"
            ),
            code: Some(door::ERROR_UNSUPPORTED),
        }),
        Err(error) => Err(End::malformed(error.to_string())),
    }
}

//! The serial console outside the guest: one client at a time, and a log on standard output.
//!
//! The guest never waits: what it writes goes into a ring, and each reader has a place in it. A reader that is too slow loses
//! the oldest bytes and is told how many.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, PoisonError};

use vmm_sys_util::eventfd::{EventFd, EFD_NONBLOCK};

use crate::calls;
use crate::devices::Ports;
use crate::error::{Context, Result};

const RING: usize = 256 << 10;
/// What a new client is shown of the past.
const REPLAY: u64 = 64 << 10;
/// Typed bytes that the guest has not read.
const TYPED: usize = 4096;
/// A log that grows beyond this starts anew: a guest that prints without end must not fill the disk.
const LOG_LIMIT: u64 = 8 << 20;

#[derive(Default)]
struct Ring {
    bytes: VecDeque<u8>,
    /// How many bytes there were in all; the ring holds the last of them.
    written: u64,
}

/// What the guest has written to its serial port.
pub struct Output {
    ring: Mutex<Ring>,
    more: EventFd,
}

impl Output {
    pub fn new() -> Result<Self> {
        Ok(Self {
            ring: Mutex::default(),
            more: EventFd::new(EFD_NONBLOCK).context("console")?,
        })
    }

    /// Adds bytes; never waits.
    pub fn append(&self, bytes: &[u8]) {
        let mut ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
        ring.bytes.extend(bytes);
        let excess = ring.bytes.len().saturating_sub(RING);
        ring.bytes.drain(..excess);
        ring.written += bytes.len() as u64;
        drop(ring);
        let _ = self.more.write(1);
    }

    /// Bytes from a position on, at most 64 KiB: how many were lost before them, and they.
    pub fn read_from(&self, position: u64) -> (u64, Vec<u8>) {
        let ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
        let oldest = ring.written - ring.bytes.len() as u64;
        let lost = oldest.saturating_sub(position);
        let skip = (position + lost - oldest) as usize;
        let bytes = ring.bytes.iter().skip(skip).take(65536).copied().collect();
        (lost, bytes)
    }

    fn written(&self) -> u64 {
        let ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
        ring.written
    }

    /// Readable after `append`.
    pub fn event(&self) -> &EventFd {
        &self.more
    }
}

/// One who reads the output.
struct Reader {
    position: u64,
    pending: Vec<u8>,
}

impl Reader {
    fn new(position: u64) -> Self {
        Self {
            position,
            pending: Vec::new(),
        }
    }

    /// Hands over what there is, as far as `sink` takes it without waiting; true when all of it went.
    fn feed(
        &mut self,
        output: &Output,
        sink: &mut impl Write,
        ready: impl Fn() -> bool,
    ) -> io::Result<bool> {
        loop {
            if self.pending.is_empty() {
                let (lost, bytes) = output.read_from(self.position);
                self.position += lost + bytes.len() as u64;
                if lost > 0 {
                    self.pending =
                        format!("\r\n[{lost} bytes of output were lost here]\r\n").into_bytes();
                }
                self.pending.extend(bytes);
                if self.pending.is_empty() {
                    return Ok(true);
                }
            }
            if !ready() {
                return Ok(false);
            }
            // No more than a pipe takes whole, so that a blocking descriptor does not wait.
            let part = self
                .pending
                .get(..self.pending.len().min(4096))
                .unwrap_or_default();
            match sink.write(part) {
                Ok(count) => drop(self.pending.drain(..count)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

struct Client {
    stream: UnixStream,
    reader: Reader,
}

/// The console's outside.
pub struct Console {
    listener: OwnedFd,
    client: Option<Client>,
    log: Option<File>,
    log_reader: Reader,
    log_limited: bool,
    typed: VecDeque<u8>,
}

impl Console {
    pub fn new(listener: OwnedFd, log: OwnedFd) -> Self {
        calls::set_nonblocking(listener.as_fd());
        let log = File::from(log);
        let regular = log.metadata().is_ok_and(|what| what.is_file());
        Self {
            listener,
            client: None,
            log_limited: regular && calls::status_flags(log.as_fd()) & libc::O_APPEND != 0,
            log: Some(log),
            log_reader: Reader::new(0),
            typed: VecDeque::new(),
        }
    }

    pub fn listener(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }

    /// The client's descriptor, while there is a client.
    pub fn client(&self) -> Option<RawFd> {
        self.client.as_ref().map(|client| client.stream.as_raw_fd())
    }

    /// Takes the next client; one who comes while another is there waits in the backlog.
    pub fn accept(&mut self, output: &Output) {
        if self.client.is_some() {
            return;
        }
        if let Ok(fd) = calls::accept(self.listener.as_fd()) {
            self.client = Some(Client {
                stream: UnixStream::from(fd),
                reader: Reader::new(output.written().saturating_sub(REPLAY)),
            });
        }
    }

    /// Passes output on to the log and the client. True when somebody could not take all of it yet.
    pub fn pass_on(&mut self, output: &Output) -> bool {
        let mut waiting = false;
        if let Some(log) = &mut self.log {
            if self.log_limited {
                limit(log);
            }
            let fd = log.as_raw_fd();
            let ready = || calls::writable(fd);
            match self.log_reader.feed(output, log, ready) {
                Ok(all) => waiting |= !all,
                // Nobody reads it any more.
                Err(_) => self.log = None,
            }
        }
        if let Some(client) = &mut self.client {
            match client.reader.feed(output, &mut client.stream, || true) {
                Ok(all) => waiting |= !all,
                Err(_) => self.client = None,
            }
        }
        waiting
    }

    /// Whether the client's bytes are to be read.
    pub fn wants_input(&self) -> bool {
        self.typed.len() < TYPED
    }

    /// Takes what the client typed, or notices that it has gone.
    pub fn receive(&mut self) {
        let Some(client) = &mut self.client else {
            return;
        };
        let mut buffer = [0; 1024];
        match client.stream.read(&mut buffer) {
            Ok(0) => self.client = None,
            Ok(count) => self.typed.extend(buffer.iter().take(count)),
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) => {}
            Err(_) => self.client = None,
        }
    }

    /// Lets go of the client.
    pub fn hang_up(&mut self) {
        self.client = None;
    }

    /// Types into the serial port as much as it takes. True while bytes may be left, here or in the port.
    pub fn type_in(&mut self, ports: &Ports) -> bool {
        let waiting = ports.remind() || !self.typed.is_empty();
        while !self.typed.is_empty() {
            let taken = ports.type_in(self.typed.make_contiguous());
            if taken == 0 {
                return true;
            }
            self.typed.drain(..taken);
        }
        waiting
    }
}

/// Starts a log anew that has grown too long.
fn limit(log: &mut File) {
    if log
        .seek(SeekFrom::End(0))
        .is_ok_and(|length| length > LOG_LIMIT)
        && log.set_len(0).is_ok()
    {
        let _ = log.write_all(b"[the log had grown too long; it starts anew here]\n");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ring_keeps_the_newest_and_counts_what_is_lost() {
        let output = Output::new().unwrap();
        output.append(b"first");
        assert_eq!(output.read_from(0), (0, b"first".to_vec()));
        assert_eq!(output.read_from(5), (0, Vec::new()));
        output.append(&vec![b'x'; RING]);
        let (lost, bytes) = output.read_from(2);
        assert_eq!(lost, 3);
        assert_eq!(bytes.len(), 65536);
    }

    #[test]
    fn a_client_sees_the_past_then_the_present_and_types() {
        let path = std::env::temp_dir().join(format!("vswitch-console-{}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let log = std::env::temp_dir().join(format!("vswitch-console-{}.log", std::process::id()));
        let mut console = Console::new(listener.into(), File::create(&log).unwrap().into());
        let output = Output::new().unwrap();
        output.append(&vec![b'-'; 100 << 10]);
        output.append(b"login: ");
        let mut client = UnixStream::connect(&path).unwrap();
        console.accept(&output);
        assert!(!console.pass_on(&output) || console.client().is_some());
        client.set_nonblocking(true).unwrap();
        let mut seen = Vec::new();
        while console.pass_on(&output) {
            let _ = client.read_to_end(&mut seen);
        }
        let _ = client.read_to_end(&mut seen);
        assert_eq!(seen.len(), REPLAY as usize);
        assert!(seen.ends_with(b"login: "));
        client.write_all(b"root\n").unwrap();
        console.receive();
        assert_eq!(console.typed, b"root\n");
        drop(client);
        console.receive();
        assert!(console.client().is_none());
        assert_eq!(std::fs::metadata(&log).unwrap().len(), (100 << 10) + 7);
        std::fs::remove_file(&path).unwrap();
        std::fs::remove_file(&log).unwrap();
    }
}

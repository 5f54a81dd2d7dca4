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
    /// `more` has been signalled and the signal not been taken: a guest prints byte by byte, and each signal is a system call.
    told: bool,
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
        let told = std::mem::replace(&mut ring.told, true);
        drop(ring);
        if !told {
            let _ = self.more.write(1);
        }
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

    /// Readable after `append`, until `take_event`.
    pub fn event(&self) -> &EventFd {
        &self.more
    }

    /// Takes the signal; the ring is to be read after that, since what was appended before it gave none of its own.
    pub fn take_event(&self) {
        // Nothing to take is no news either.
        let _ = self.more.read();
        self.ring
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .told = false;
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

    /// Hands over what there is now, as far as `sink` takes it without waiting; true when all of it went. What the guest
    /// writes meanwhile has to wait for the next call: a guest that prints without end must not keep the machine's thread
    /// from everything else.
    fn feed(
        &mut self,
        output: &Output,
        sink: &mut impl Write,
        ready: impl Fn() -> bool,
    ) -> io::Result<bool> {
        let end = output.written();
        loop {
            if self.pending.is_empty() {
                if self.position >= end {
                    return Ok(true);
                }
                let (lost, bytes) = output.read_from(self.position);
                self.position += lost + bytes.len() as u64;
                if lost > 0 {
                    self.pending =
                        format!("\r\n[{lost} bytes of output were lost here]\r\n").into_bytes();
                }
                self.pending.extend(bytes);
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
    /// It did not take all that there was for it.
    behind: bool,
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
                behind: false,
            });
        }
    }

    /// Whether the client has to take bytes before it can be given more.
    pub fn client_is_behind(&self) -> bool {
        self.client.as_ref().is_some_and(|client| client.behind)
    }

    /// Passes output on to the log and the client. True when the log has to be tried again later; the client's descriptor says
    /// itself when it takes more.
    pub fn pass_on(&mut self, output: &Output) -> bool {
        let mut waiting = false;
        if let Some(log) = &mut self.log {
            if self.log_limited {
                limit(log);
            }
            let fd = log.as_raw_fd();
            let ready = || calls::writable(fd);
            match self.log_reader.feed(output, log, ready) {
                Ok(all) => waiting = !all,
                // Nobody reads it any more.
                Err(_) => self.log = None,
            }
        }
        if let Some(client) = &mut self.client {
            match client.reader.feed(output, &mut client.stream, || true) {
                Ok(all) => client.behind = !all,
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

    /// Types into the serial port as much as it takes; gives how many bytes may be left, here or in the port.
    pub fn type_in(&mut self, ports: &Ports) -> usize {
        let left = ports.remind() + self.typed.len();
        while !self.typed.is_empty() {
            let taken = ports.type_in(self.typed.make_contiguous());
            if taken == 0 {
                break;
            }
            self.typed.drain(..taken);
        }
        left
    }
}

/// Starts a log anew that has grown too long; between two looks it grows by what `feed` hands over at once, no more than the ring
/// holds and 64 KiB.
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
    fn many_bytes_give_one_signal_until_it_is_taken() {
        let output = Output::new().unwrap();
        for _ in 0..100 {
            output.append(b"x");
        }
        assert_eq!(output.event().read().ok(), Some(1));
        output.append(b"x");
        assert!(output.event().read().is_err(), "it was not taken yet");
        output.take_event();
        output.append(b"x");
        assert_eq!(output.event().read().ok(), Some(1));
    }

    /// Takes all it is given, while the guest writes twice as much.
    struct Outrun<'a>(&'a Output, usize);

    impl Write for Outrun<'_> {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.append(&vec![b'y'; 2 * bytes.len()]);
            self.1 += bytes.len();
            assert!(self.1 <= 4 * RING, "fed without end");
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_guest_that_prints_without_end_holds_nobody_up() {
        let output = Output::new().unwrap();
        output.append(&[b'x'; 1000]);
        let (mut reader, mut sink) = (Reader::new(0), Outrun(&output, 0));
        assert!(reader.feed(&output, &mut sink, || true).unwrap());
        assert_eq!(sink.1, 1000);
        // What came meanwhile is signalled, and goes with the next call.
        assert!(output.event().read().is_ok());
        assert!(reader.feed(&output, &mut sink, || true).unwrap());
        assert!(sink.1 > 1000 && sink.1 <= 1000 + RING + 65536);
    }

    #[test]
    fn a_log_stays_bounded_however_much_a_guest_prints() {
        let name = std::env::temp_dir().join(format!("vswitch-long-{}", std::process::id()));
        let path = name.with_extension("sock");
        let _ = std::fs::remove_file(&path);
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let log = File::options().append(true).create(true).open(&name);
        let mut console = Console::new(listener.into(), log.unwrap().into());
        let output = Output::new().unwrap();
        for _ in 0..80 {
            output.append(&vec![b'x'; RING]);
            assert!(!console.pass_on(&output));
            let length = std::fs::metadata(&name).unwrap().len();
            assert!(length <= LOG_LIMIT + RING as u64 + 65536, "{length}");
        }
        std::fs::remove_file(&path).unwrap();
        std::fs::remove_file(&name).unwrap();
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
        client.set_nonblocking(true).unwrap();
        let mut seen = Vec::new();
        assert!(!console.pass_on(&output), "the log takes all at once");
        while console.client_is_behind() {
            let _ = client.read_to_end(&mut seen);
            console.pass_on(&output);
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

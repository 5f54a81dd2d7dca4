//! The datapath's side of one extension's upcall channel. The twin of `vswitch/engine/python/upcalls.py`.
//!
//! Messages are specified in `vswitch/upcall.py`. A reply that is malformed, answers nothing that was asked or comes
//! after its deadline fails the link: all that waits for it, and all that would ask it later, gets what its
//! `on_failure` says.

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use vswitch_memory::{eventfd, GuestMemory, Region};
use vswitch_ring::{RingReader, RingWriter};
use vswitch_wire::packet::VM_PKT_COMP;

use crate::counters::ExtensionCounters;
use crate::drops::DropReason;
use crate::fields::ALL_BITS;
use crate::program::{Answer, Drop};

pub const RING_BYTES: usize = 256 * 1024;
pub const MEMFD_BYTES: usize = 2 * RING_BYTES;
/// Bytes of a frame that an extension is shown at most.
pub const MAX_FRAME: usize = 2048;
const MAX_REASON: usize = 256;
const VERSION: u16 = 1;
const NONE: u32 = u32::MAX;
const REPLY_SIZE: usize = 20;
const PAGE: usize = 4096;

/// What the owner knows of an extension; the fds stay the owner's.
#[derive(Clone, Debug)]
pub struct Channel {
    pub id: u64,
    pub name: String,
    /// Let frames pass when there is no verdict.
    pub fail_open: bool,
    pub memfd: RawFd,
    pub request_fd: RawFd,
    pub reply_fd: RawFd,
    pub ingress: bool,
    pub egress: bool,
}

/// What an extension is asked; `vswitch.upcall.UpcallRequest`.
pub struct Request<'a> {
    pub in_port: u32,
    pub out_port: Option<u32>,
    pub vlan_tci: Option<u16>,
    pub frame_length: usize,
    pub port_name: &'a str,
    /// At most [`MAX_FRAME`] bytes.
    pub data: &'a [u8],
    pub trace: bool,
    /// To be segmented on delivery: the length in its IP header means nothing.
    pub large_send: bool,
}

impl Request<'_> {
    fn pack(&self) -> Vec<u8> {
        let name = &self.port_name.as_bytes()[..self.port_name.len().min(usize::from(u16::MAX))];
        let mut out = Vec::with_capacity(24 + name.len() + self.data.len());
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.push(u8::from(self.out_port.is_some()));
        out.push(u8::from(self.trace) | u8::from(self.large_send) << 1);
        out.extend_from_slice(&self.in_port.to_le_bytes());
        out.extend_from_slice(&self.out_port.unwrap_or(NONE).to_le_bytes());
        out.extend_from_slice(&self.vlan_tci.map_or(NONE, u32::from).to_le_bytes());
        out.extend_from_slice(
            &u32::try_from(self.frame_length)
                .unwrap_or(u32::MAX)
                .to_le_bytes(),
        );
        out.extend_from_slice(&(name.len() as u16).to_le_bytes());
        out.extend_from_slice(
            &u16::try_from(self.data.len())
                .unwrap_or(u16::MAX)
                .to_le_bytes(),
        );
        out.extend_from_slice(name);
        out.extend_from_slice(self.data);
        out
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Allow,
    Drop,
    Error,
}

#[derive(Debug, PartialEq, Eq)]
struct Reply {
    verdict: Verdict,
    cacheable: bool,
    ttl_ms: u32,
    fields: u64,
    reason: String,
}

impl Reply {
    /// Reads a reply; padding behind the reason is allowed. Control characters in the reason become blanks: it ends
    /// up on terminals.
    fn decode(payload: &[u8]) -> Result<Reply, String> {
        let Some((header, rest)) = payload.split_first_chunk::<REPLY_SIZE>() else {
            return Err(format!(
                "reply of {} bytes, at least {REPLY_SIZE} expected",
                payload.len()
            ));
        };
        let version = u16::from_le_bytes([header[0], header[1]]);
        if version != VERSION {
            return Err(format!("reply of version {version}, {VERSION} expected"));
        }
        let verdict = match header[2] {
            0 => Verdict::Allow,
            1 => Verdict::Drop,
            2 => Verdict::Error,
            other => return Err(format!("reply with verdict {other}, 0 to 2 expected")),
        };
        let reason_length = usize::from(u16::from_le_bytes([header[16], header[17]]));
        let reason = rest
            .get(..reason_length)
            .filter(|_| reason_length <= MAX_REASON);
        let Some(reason) = reason else {
            return Err(format!(
                "reply of {} bytes with a reason of {reason_length}",
                payload.len()
            ));
        };
        let Ok(reason) = std::str::from_utf8(reason) else {
            return Err("reply whose reason is not UTF-8".into());
        };
        let fields = u64::from_le_bytes([
            header[8], header[9], header[10], header[11], header[12], header[13], header[14],
            header[15],
        ]);
        if fields & !ALL_BITS != 0 {
            return Err(format!(
                "a reply names unknown fields {:#x}",
                fields & !ALL_BITS
            ));
        }
        Ok(Reply {
            verdict,
            cacheable: header[3] & 1 != 0,
            ttl_ms: u32::from_le_bytes([header[4], header[5], header[6], header[7]]),
            fields,
            reason: reason.replace(char::is_control, " "),
        })
    }
}

struct Pending {
    waiter: u64,
    deadline_ns: u64,
}

/// One extension. A waiter is a number that comes back with its answer.
pub struct Link {
    pub channel: Channel,
    pub name: Arc<str>,
    pub counters: ExtensionCounters,
    writer: RingWriter,
    reader: RingReader,
    request_fd: OwnedFd,
    reply_fd: OwnedFd,
    deadline_ns: u64,
    next_id: u64,
    pending: BTreeMap<u64, Pending>,
    /// Ids whose reply is to come but no longer wanted, and when it is due all the same: what changes in the switch
    /// gives an extension that hangs no new time.
    given_up: BTreeMap<u64, u64>,
    /// Requests that are not in the ring yet, in order.
    backlog: VecDeque<(u64, Vec<u8>)>,
    /// Whether `push` may have something to do.
    pub dirty: bool,
    scratch: Vec<u8>,
}

impl Link {
    pub fn new(channel: Channel, deadline_ns: u64) -> Result<Self, String> {
        let broken = |error: &dyn std::fmt::Display| format!("extension {}: {error}", channel.name);
        let region = Region {
            gpa: 0,
            size: MEMFD_BYTES as u64,
            fd: channel.memfd,
        };
        let memory = GuestMemory::new(&[region]).map_err(|error| broken(&error))?;
        let pages = (RING_BYTES / PAGE) as u64;
        let ring = |first: u64| {
            let pfns: Vec<u64> = (first..first + pages).collect();
            memory
                .view(&pfns, 0, RING_BYTES)
                .map_err(|error| broken(&error))
        };
        Ok(Link {
            writer: RingWriter::new(ring(0)?).map_err(|error| broken(&error))?,
            reader: RingReader::new(ring(pages)?).map_err(|error| broken(&error))?,
            request_fd: duplicate(channel.request_fd).map_err(|error| broken(&error))?,
            reply_fd: duplicate(channel.reply_fd).map_err(|error| broken(&error))?,
            name: Arc::from(channel.name.as_str()),
            channel,
            counters: ExtensionCounters::default(),
            deadline_ns,
            next_id: 1,
            pending: BTreeMap::new(),
            given_up: BTreeMap::new(),
            backlog: VecDeque::new(),
            dirty: false,
            scratch: Vec::new(),
        })
    }

    pub fn reply_fd(&self) -> RawFd {
        self.reply_fd.as_raw_fd()
    }

    pub fn failed(&self) -> bool {
        self.counters.failed
    }

    /// Queues a request; `None` = the waiter comes back from `replies` or `fail`. A failed link answers at once.
    pub fn ask(&mut self, request: &Request<'_>, waiter: u64, now_ns: u64) -> Option<Answer> {
        if self.failed() {
            return Some(self.on_failure(self.failure_text()));
        }
        let id = self.next_id;
        self.next_id += 1;
        self.counters.upcalls += 1;
        self.pending.insert(
            id,
            Pending {
                waiter,
                deadline_ns: now_ns.saturating_add(self.deadline_ns),
            },
        );
        self.backlog.push_back((id, request.pack()));
        self.dirty = true;
        None
    }

    /// Moves what was asked into the ring and wakes the extension. An error means that the ring lies.
    pub fn push(&mut self) -> Result<(), String> {
        self.dirty = false;
        if self.failed() {
            return Ok(());
        }
        while let Some((id, payload)) = self.backlog.front() {
            if self.pending.contains_key(id) {
                if !self
                    .writer
                    .write_inband(payload, *id, true)
                    .map_err(|error| error.to_string())?
                {
                    break;
                }
            } else {
                self.given_up.remove(id);
            }
            self.backlog.pop_front();
        }
        if self.writer.commit().map_err(|error| error.to_string())? {
            eventfd::signal_shared(self.request_fd.as_raw_fd());
        }
        Ok(())
    }

    /// Appends what the extension answered, in its order; stops at the first that is no answer. A reply settles one
    /// request that was asked, which bounds the work.
    pub fn replies(&mut self, settled: &mut Vec<(u64, Answer)>) -> Result<(), String> {
        eventfd::drain(self.reply_fd.as_raw_fd());
        if self.failed() {
            return Ok(());
        }
        self.dirty = !self.backlog.is_empty();
        let mut scratch = std::mem::take(&mut self.scratch);
        let result = self.take_replies(&mut scratch, settled);
        self.scratch = scratch;
        result
    }

    fn take_replies(
        &mut self,
        scratch: &mut Vec<u8>,
        settled: &mut Vec<(u64, Answer)>,
    ) -> Result<(), String> {
        loop {
            while let Some(packet) = self
                .reader
                .next(scratch)
                .map_err(|error| error.to_string())?
            {
                let kind = packet.descriptor.kind;
                if kind != VM_PKT_COMP {
                    return Err(format!(
                        "a packet of type {kind} came where replies are expected"
                    ));
                }
                let id = packet.descriptor.transaction_id;
                if self.given_up.remove(&id).is_some() {
                    continue;
                }
                if !self.pending.contains_key(&id) {
                    return Err(format!("a reply to upcall {id}, which was not asked"));
                }
                let reply = Reply::decode(packet.payload)?;
                if let Some(pending) = self.pending.remove(&id) {
                    settled.push((pending.waiter, self.answer(reply)));
                }
            }
            if self.reader.commit().map_err(|error| error.to_string())? {
                eventfd::signal_shared(self.request_fd.as_raw_fd());
            }
            if !self.reader.unmask().map_err(|error| error.to_string())? {
                return Ok(());
            }
        }
    }

    /// Forgets the waiters that `wanted` picks; their replies will be ignored.
    pub fn give_up(&mut self, wanted: impl Fn(u64) -> bool) {
        let given_up = &mut self.given_up;
        self.pending.retain(|id, pending| {
            let goes = wanted(pending.waiter);
            if goes {
                given_up.insert(*id, pending.deadline_ns);
            }
            !goes
        });
        // Those that are not in the ring yet never get there.
        self.dirty |= !self.backlog.is_empty();
    }

    /// Marks the link failed and answers all that waits by `on_failure`.
    pub fn fail(&mut self, why: &str) -> Vec<(u64, Answer)> {
        self.counters.failed = true;
        self.counters.why = why.to_owned();
        let answer = self.on_failure(self.failure_text());
        let pending = std::mem::take(&mut self.pending);
        self.given_up.clear();
        self.backlog.clear();
        pending
            .into_values()
            .map(|pending| (pending.waiter, answer.clone()))
            .collect()
    }

    /// When the oldest request has to be answered.
    pub fn next_deadline_ns(&self) -> Option<u64> {
        let wanted = self.pending.values().next();
        let given_up = self.given_up.values().next().copied();
        wanted
            .map(|pending| pending.deadline_ns)
            .into_iter()
            .chain(given_up)
            .min()
    }

    fn failure_text(&self) -> String {
        format!("extension {} has failed: {}", self.name, self.counters.why)
    }

    fn on_failure(&self, text: String) -> Answer {
        if self.channel.fail_open {
            return Answer::default();
        }
        let by = Some(self.name.clone());
        Answer {
            drop: Some(Drop {
                reason: DropReason::RequiredExtensionMissing,
                detail: text.into(),
                by,
            }),
            ..Answer::default()
        }
    }

    fn answer(&mut self, reply: Reply) -> Answer {
        let ttl_ns = u64::from(reply.ttl_ms) * 1_000_000;
        let (fields, cacheable) = (reply.fields, reply.cacheable);
        match reply.verdict {
            Verdict::Allow => {
                self.counters.allowed += 1;
                Answer {
                    drop: None,
                    fields,
                    cacheable,
                    ttl_ns,
                }
            }
            Verdict::Drop => {
                self.counters.dropped += 1;
                let text = if reply.reason.is_empty() {
                    "no reason given".into()
                } else {
                    reply.reason
                };
                let by = Some(self.name.clone());
                let drop = Some(Drop {
                    reason: DropReason::Filtered,
                    detail: text.into(),
                    by,
                });
                Answer {
                    drop,
                    fields,
                    cacheable,
                    ttl_ns,
                }
            }
            Verdict::Error => {
                self.counters.errors += 1;
                let text = format!("extension {} raised: {}", self.name, reply.reason);
                self.counters.why = reply.reason;
                self.on_failure(text)
            }
        }
    }
}

fn duplicate(fd: RawFd) -> std::io::Result<OwnedFd> {
    // SAFETY: plain values in, a new fd or -1 out.
    let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 0) };
    if copy < 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: a new fd that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reply(verdict: u8, fields: u64, reason: &[u8], length: u16) -> Vec<u8> {
        let mut out = vec![1, 0, verdict, 1, 5, 0, 0, 0];
        out.extend_from_slice(&fields.to_le_bytes());
        out.extend_from_slice(&length.to_le_bytes());
        out.extend_from_slice(&[0, 0]);
        out.extend_from_slice(reason);
        out
    }

    #[test]
    fn a_reply_is_read_as_specified() {
        let got = Reply::decode(&reply(1, 1 << 12, b"telnet\0\0", 6)).unwrap();
        assert_eq!(
            (got.verdict, got.cacheable, got.ttl_ms),
            (Verdict::Drop, true, 5)
        );
        assert_eq!((got.fields, got.reason.as_str()), (1 << 12, "telnet"));
        let got = Reply::decode(&reply(1, 0, "a\n\u{1b}[2J\u{9b}b\u{e9}".as_bytes(), 11)).unwrap();
        assert_eq!(got.reason, "a  [2J b\u{e9}");
    }

    #[test]
    fn malformed_replies_are_refused_with_a_reason() {
        for (bytes, words) in [
            (vec![], "reply of 0 bytes"),
            (reply(3, 0, b"", 0), "verdict 3"),
            (reply(0, 1 << 40, b"", 0), "unknown fields"),
            (reply(0, 0, b"abc", 4), "a reason of 4"),
            (reply(0, 0, &[b'a'; 300], 300), "a reason of 300"),
            (reply(0, 0, &[0xFF], 1), "not UTF-8"),
            ([2, 0].into_iter().chain([0; 18]).collect(), "version 2"),
        ] {
            let error = Reply::decode(&bytes).unwrap_err();
            assert!(error.contains(words), "{error}");
        }
    }
}

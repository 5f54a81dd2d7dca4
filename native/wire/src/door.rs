//! Door frames: the seqpacket protocol between a partition's two sides (docs/door.md is its specification).
//!
//! One frame is one SOCK_SEQPACKET message: a 16-byte header and a body of at most 65520 bytes. JSON bodies (CONFIGURE,
//! EXEC) travel host to guest and are handed on as bytes.

use crate::bytes::{Bytes, Put};
use crate::error::{bad, Result, WireError};
use crate::record::{Shown, Value};

pub const DOOR_VERSION: u16 = 1;
pub const HEADER_SIZE: usize = 16;
pub const MAX_FRAME: usize = 65536;
pub const MAX_BODY: usize = MAX_FRAME - HEADER_SIZE;
pub const MAX_TEXT: usize = 4096;
pub const MAX_REGIONS: u32 = 16;
pub const MAX_VPS: u32 = 64;
pub const MESSAGE_SIZE: usize = 256;
pub const SINT_COUNT: u32 = 16;

pub const HELLO: u16 = 0x01;
pub const HELLO_ACK: u16 = 0x02;
pub const HYPERCALL: u16 = 0x10;
pub const RESULT: u16 = 0x11;
pub const MSR_WRITE: u16 = 0x12;
pub const MSR_READ: u16 = 0x13;
pub const MSR_RESULT: u16 = 0x14;
pub const DELIVER: u16 = 0x20;
pub const EOM: u16 = 0x21;
pub const EVENTFD: u16 = 0x22;
pub const PARK: u16 = 0x30;
pub const PARKED: u16 = 0x31;
pub const RESUME: u16 = 0x32;
pub const RESET: u16 = 0x33;
pub const RESET_DONE: u16 = 0x34;
pub const CONFIGURE: u16 = 0x40;
pub const CONFIGURED: u16 = 0x41;
pub const EXEC: u16 = 0x42;
pub const EXEC_STARTED: u16 = 0x43;
pub const EXEC_EXIT: u16 = 0x44;
pub const KILL: u16 = 0x45;
pub const SHUTDOWN: u16 = 0x46;
pub const ERROR: u16 = 0x7F;

pub const ERROR_MALFORMED: u32 = 1;
pub const ERROR_UNSUPPORTED: u32 = 2;
pub const HELLO_RESUME: u32 = 1;

/// The fixed head of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    pub kind: u16,
    pub sequence: u32,
    pub length: u32,
}

/// The guest's register image at a hypercall.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hypercall {
    pub vp: u32,
    pub rcx: u64,
    pub rdx: u64,
    pub r8: u64,
    pub xmm: [u8; 96],
}

/// The register image after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HypercallResult {
    pub rax: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub r8: u64,
    pub xmm: [u8; 96],
}

/// HELLO; `regions` are (gpa, size) pairs of u64, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello<'a> {
    pub version_min: u16,
    pub version_max: u16,
    pub flags: u32,
    pub partition_id: u64,
    pub vp_count: u32,
    pub privileges: u64,
    regions: &'a [u8],
}

impl<'a> Hello<'a> {
    const SIZE: usize = 32;

    /// Guest-physical address and size of each region.
    pub fn regions(&self) -> impl Iterator<Item = (u64, u64)> + 'a {
        self.regions.chunks_exact(16).filter_map(|entry| {
            let (gpa, size) = entry.split_first_chunk::<8>()?;
            Some((
                u64::from_le_bytes(*gpa),
                u64::from_le_bytes(*size.first_chunk::<8>()?),
            ))
        })
    }

    fn parse(body: &'a [u8]) -> Result<Self> {
        const WHAT: &str = "HELLO";
        let bytes = Bytes::new(WHAT, body, Self::SIZE)?;
        let (version_min, version_max, flags) = (bytes.u16(0)?, bytes.u16(2)?, bytes.u32(4)?);
        let (vp_count, region_count) = (bytes.u32(16)?, bytes.u32(20)?);
        if version_min > version_max || version_min == 0 {
            return bad(WHAT, "the version range is empty");
        }
        if flags & !HELLO_RESUME != 0 {
            return bad(WHAT, "unknown flags");
        }
        if vp_count == 0 || vp_count > MAX_VPS {
            return bad(WHAT, "1..64 virtual processors allowed");
        }
        if region_count == 0 || region_count > MAX_REGIONS {
            return bad(WHAT, "1..16 memory regions allowed");
        }
        exact(WHAT, body, Self::SIZE + region_count as usize * 16)?;
        let hello = Self {
            version_min,
            version_max,
            flags,
            partition_id: bytes.u64(8)?,
            vp_count,
            privileges: bytes.u64(24)?,
            regions: bytes.slice(Self::SIZE, region_count as usize * 16)?,
        };
        let mut end = 0;
        for (gpa, size) in hello.regions() {
            let top = gpa.checked_add(size);
            if gpa % 4096 != 0
                || size % 4096 != 0
                || size == 0
                || top.is_none_or(|top| top > 1 << 52)
            {
                return bad(WHAT, "a region is not whole pages below 2^52");
            }
            if gpa < end {
                return bad(WHAT, "a region overlaps or precedes the one before");
            }
            end = gpa + size;
        }
        Ok(hello)
    }
}

/// A frame's message; texts and documents are borrowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DoorMessage<'a> {
    Hello(Hello<'a>),
    HelloAck {
        version: u16,
        flags: u32,
    },
    Hypercall(Hypercall),
    HypercallResult(HypercallResult),
    MsrWrite {
        vp: u32,
        msr: u32,
        value: u64,
    },
    MsrRead {
        vp: u32,
        msr: u32,
    },
    MsrResult {
        fault: bool,
        value: u64,
    },
    Deliver {
        vp: u32,
        sint: u32,
        message: &'a [u8],
    },
    Eom {
        vp: u32,
        sint: u32,
    },
    EventFd {
        connection_id: u32,
        add: bool,
    },
    Park,
    Parked,
    Resume,
    Reset,
    ResetDone,
    Configure {
        document: &'a [u8],
    },
    Configured {
        status: u32,
        text: &'a str,
    },
    Exec {
        document: &'a [u8],
    },
    ExecStarted {
        status: u32,
        pid: u32,
        text: &'a str,
    },
    ExecExit {
        wait_status: u32,
        text: &'a str,
    },
    Kill {
        exec_sequence: u32,
        signal: u32,
    },
    Shutdown,
    DoorError {
        code: u32,
        text: &'a str,
    },
}

fn exact(what: &'static str, body: &[u8], size: usize) -> Result<()> {
    if body.len() < size {
        return Err(WireError::Short {
            what,
            needed: size,
            have: body.len(),
        });
    }
    if body.len() > size {
        return bad(what, "the body is too long");
    }
    Ok(())
}

fn text<'a>(what: &'static str, body: &'a [u8], at: usize) -> Result<&'a str> {
    let data = Bytes::new(what, body, at)?.slice(at, body.len() - at)?;
    if data.len() > MAX_TEXT {
        return bad(what, "the text is longer than 4096 bytes");
    }
    match std::str::from_utf8(data) {
        Ok(text) => Ok(text),
        Err(_) => bad(what, "the text is not UTF-8"),
    }
}

fn zero(what: &'static str, value: u32) -> Result<()> {
    if value != 0 {
        return bad(what, "a reserved word is not 0");
    }
    Ok(())
}

fn slot(what: &'static str, vp: u32, sint: u32) -> Result<()> {
    if vp >= MAX_VPS {
        return bad(what, "no such virtual processor");
    }
    if sint >= SINT_COUNT {
        return bad(what, "no such SINT");
    }
    Ok(())
}

impl Header {
    /// Checks the head of a whole frame.
    pub fn parse(frame: &[u8]) -> Result<Self> {
        const WHAT: &str = "door frame";
        let bytes = Bytes::new(WHAT, frame, HEADER_SIZE)?;
        if frame.len() > MAX_FRAME {
            return bad(WHAT, "longer than 65536 bytes");
        }
        if bytes.u16(2)? != 0 || bytes.u32(12)? != 0 {
            return bad(WHAT, "flags or a reserved word are not 0");
        }
        let header = Self {
            kind: bytes.u16(0)?,
            sequence: bytes.u32(4)?,
            length: bytes.u32(8)?,
        };
        if header.length as usize != frame.len() - HEADER_SIZE {
            return bad(WHAT, "its length differs from the bytes that are there");
        }
        Ok(header)
    }
}

impl<'a> DoorMessage<'a> {
    /// Checks one whole frame and gives its sequence number and message.
    pub fn parse(frame: &'a [u8]) -> Result<(u32, Self)> {
        let header = Header::parse(frame)?;
        let body = frame.get(HEADER_SIZE..).unwrap_or_default();
        Ok((header.sequence, Self::parse_body(header.kind, body)?))
    }

    fn parse_body(kind: u16, body: &'a [u8]) -> Result<Self> {
        let word = |what, at| Bytes::new(what, body, at + 4)?.u32(at);
        Ok(match kind {
            HELLO => Self::Hello(Hello::parse(body)?),
            HELLO_ACK => {
                exact("HELLO_ACK", body, 8)?;
                let bytes = Bytes::new("HELLO_ACK", body, 8)?;
                zero("HELLO_ACK", u32::from(bytes.u16(2)?))?;
                let flags = bytes.u32(4)?;
                if flags & !HELLO_RESUME != 0 {
                    return bad("HELLO_ACK", "unknown flags");
                }
                Self::HelloAck {
                    version: bytes.u16(0)?,
                    flags,
                }
            }
            HYPERCALL => {
                exact("HYPERCALL", body, 128)?;
                let bytes = Bytes::new("HYPERCALL", body, 128)?;
                zero("HYPERCALL", bytes.u32(4)?)?;
                Self::Hypercall(Hypercall {
                    vp: bytes.u32(0)?,
                    rcx: bytes.u64(8)?,
                    rdx: bytes.u64(16)?,
                    r8: bytes.u64(24)?,
                    xmm: bytes.bytes(32)?,
                })
            }
            RESULT => {
                exact("RESULT", body, 128)?;
                let bytes = Bytes::new("RESULT", body, 128)?;
                Self::HypercallResult(HypercallResult {
                    rax: bytes.u64(0)?,
                    rcx: bytes.u64(8)?,
                    rdx: bytes.u64(16)?,
                    r8: bytes.u64(24)?,
                    xmm: bytes.bytes(32)?,
                })
            }
            MSR_WRITE => {
                exact("MSR_WRITE", body, 16)?;
                let bytes = Bytes::new("MSR_WRITE", body, 16)?;
                Self::MsrWrite {
                    vp: bytes.u32(0)?,
                    msr: bytes.u32(4)?,
                    value: bytes.u64(8)?,
                }
            }
            MSR_READ => {
                exact("MSR_READ", body, 8)?;
                Self::MsrRead {
                    vp: word("MSR_READ", 0)?,
                    msr: word("MSR_READ", 4)?,
                }
            }
            MSR_RESULT => {
                exact("MSR_RESULT", body, 16)?;
                let bytes = Bytes::new("MSR_RESULT", body, 16)?;
                zero("MSR_RESULT", bytes.u32(4)?)?;
                let status = bytes.u32(0)?;
                if status > 1 {
                    return bad("MSR_RESULT", "status must be 0 or 1");
                }
                Self::MsrResult {
                    fault: status == 1,
                    value: bytes.u64(8)?,
                }
            }
            DELIVER => {
                exact("DELIVER", body, 8 + MESSAGE_SIZE)?;
                let (vp, sint) = (word("DELIVER", 0)?, word("DELIVER", 4)?);
                slot("DELIVER", vp, sint)?;
                Self::Deliver {
                    vp,
                    sint,
                    message: body.get(8..).unwrap_or_default(),
                }
            }
            EOM => {
                exact("EOM", body, 8)?;
                let (vp, sint) = (word("EOM", 0)?, word("EOM", 4)?);
                slot("EOM", vp, sint)?;
                Self::Eom { vp, sint }
            }
            EVENTFD => {
                exact("EVENTFD", body, 8)?;
                let operation = word("EVENTFD", 4)?;
                if operation > 1 {
                    return bad("EVENTFD", "operation must be 0 (remove) or 1 (add)");
                }
                Self::EventFd {
                    connection_id: word("EVENTFD", 0)?,
                    add: operation == 1,
                }
            }
            PARK => exact("PARK", body, 0).map(|()| Self::Park)?,
            PARKED => exact("PARKED", body, 0).map(|()| Self::Parked)?,
            RESUME => exact("RESUME", body, 0).map(|()| Self::Resume)?,
            RESET => exact("RESET", body, 0).map(|()| Self::Reset)?,
            RESET_DONE => exact("RESET_DONE", body, 0).map(|()| Self::ResetDone)?,
            CONFIGURE => Self::Configure { document: body },
            CONFIGURED => Self::Configured {
                status: word("CONFIGURED", 0)?,
                text: text("CONFIGURED", body, 4)?,
            },
            EXEC => Self::Exec { document: body },
            EXEC_STARTED => Self::ExecStarted {
                status: word("EXEC_STARTED", 0)?,
                pid: word("EXEC_STARTED", 4)?,
                text: text("EXEC_STARTED", body, 8)?,
            },
            EXEC_EXIT => Self::ExecExit {
                wait_status: word("EXEC_EXIT", 0)?,
                text: text("EXEC_EXIT", body, 4)?,
            },
            KILL => {
                exact("KILL", body, 8)?;
                let signal = word("KILL", 4)?;
                if signal == 0 || signal > 64 {
                    return bad("KILL", "signals are 1..64");
                }
                Self::Kill {
                    exec_sequence: word("KILL", 0)?,
                    signal,
                }
            }
            SHUTDOWN => exact("SHUTDOWN", body, 0).map(|()| Self::Shutdown)?,
            ERROR => Self::DoorError {
                code: word("ERROR", 0)?,
                text: text("ERROR", body, 4)?,
            },
            number => {
                return Err(WireError::Unknown {
                    protocol: "door",
                    number: u32::from(number),
                })
            }
        })
    }

    /// The frame type.
    pub fn kind(&self) -> u16 {
        match self {
            Self::Hello(_) => HELLO,
            Self::HelloAck { .. } => HELLO_ACK,
            Self::Hypercall(_) => HYPERCALL,
            Self::HypercallResult(_) => RESULT,
            Self::MsrWrite { .. } => MSR_WRITE,
            Self::MsrRead { .. } => MSR_READ,
            Self::MsrResult { .. } => MSR_RESULT,
            Self::Deliver { .. } => DELIVER,
            Self::Eom { .. } => EOM,
            Self::EventFd { .. } => EVENTFD,
            Self::Park => PARK,
            Self::Parked => PARKED,
            Self::Resume => RESUME,
            Self::Reset => RESET,
            Self::ResetDone => RESET_DONE,
            Self::Configure { .. } => CONFIGURE,
            Self::Configured { .. } => CONFIGURED,
            Self::Exec { .. } => EXEC,
            Self::ExecStarted { .. } => EXEC_STARTED,
            Self::ExecExit { .. } => EXEC_EXIT,
            Self::Kill { .. } => KILL,
            Self::Shutdown => SHUTDOWN,
            Self::DoorError { .. } => ERROR,
        }
    }

    /// One frame, ready for sendmsg(2); bodies beyond 65520 bytes are refused.
    pub fn encode(&self, sequence: u32) -> Result<Vec<u8>> {
        let mut out = Vec::with_capacity(HEADER_SIZE + 128);
        out.put_u16(self.kind());
        out.put_u16(0);
        out.put_u32(sequence);
        out.put_u64(0);
        self.put_body(&mut out);
        let length = out.len() - HEADER_SIZE;
        if length > MAX_BODY {
            return bad("door frame", "the body is longer than 65520 bytes");
        }
        if let Some(field) = out.get_mut(8..12) {
            field.copy_from_slice(&(length as u32).to_le_bytes());
        }
        Ok(out)
    }

    fn put_body(&self, out: &mut Vec<u8>) {
        match self {
            Self::Hello(hello) => {
                out.put_u16(hello.version_min);
                out.put_u16(hello.version_max);
                out.put_u32(hello.flags);
                out.put_u64(hello.partition_id);
                out.put_u32(hello.vp_count);
                out.put_u32((hello.regions.len() / 16) as u32);
                out.put_u64(hello.privileges);
                out.extend_from_slice(hello.regions);
            }
            Self::HelloAck { version, flags } => {
                out.put_u16(*version);
                out.put_u16(0);
                out.put_u32(*flags);
            }
            Self::Hypercall(call) => {
                out.put_u32(call.vp);
                out.put_u32(0);
                for register in [call.rcx, call.rdx, call.r8] {
                    out.put_u64(register);
                }
                out.extend_from_slice(&call.xmm);
            }
            Self::HypercallResult(result) => {
                for register in [result.rax, result.rcx, result.rdx, result.r8] {
                    out.put_u64(register);
                }
                out.extend_from_slice(&result.xmm);
            }
            Self::MsrWrite { vp, msr, value } => {
                out.put_u32(*vp);
                out.put_u32(*msr);
                out.put_u64(*value);
            }
            Self::MsrResult { fault, value } => {
                out.put_u32(u32::from(*fault));
                out.put_u32(0);
                out.put_u64(*value);
            }
            Self::Deliver { vp, sint, message } => {
                out.put_u32(*vp);
                out.put_u32(*sint);
                out.extend_from_slice(message);
            }
            Self::MsrRead {
                vp: first,
                msr: second,
            }
            | Self::Eom {
                vp: first,
                sint: second,
            }
            | Self::Kill {
                exec_sequence: first,
                signal: second,
            } => {
                out.put_u32(*first);
                out.put_u32(*second);
            }
            Self::EventFd { connection_id, add } => {
                out.put_u32(*connection_id);
                out.put_u32(u32::from(*add));
            }
            Self::Park
            | Self::Parked
            | Self::Resume
            | Self::Reset
            | Self::ResetDone
            | Self::Shutdown => {}
            Self::Configure { document } | Self::Exec { document } => {
                out.extend_from_slice(document)
            }
            Self::ExecStarted { status, pid, text } => {
                out.put_u32(*status);
                out.put_u32(*pid);
                out.extend_from_slice(text.as_bytes());
            }
            Self::Configured { status: word, text }
            | Self::ExecExit {
                wait_status: word,
                text,
            }
            | Self::DoorError { code: word, text } => {
                out.put_u32(*word);
                out.extend_from_slice(text.as_bytes());
            }
        }
    }

    /// Name and fields, as the Python twin has them; JSON documents as bytes.
    pub fn show(&self) -> Shown {
        let int = |value: &u32| Value::Int(u64::from(*value));
        match self {
            Self::Hello(hello) => {
                let region = |(gpa, size)| {
                    Value::Record(vec![("gpa", Value::Int(gpa)), ("size", Value::Int(size))])
                };
                let fields = vec![
                    ("partition_id", Value::Int(hello.partition_id)),
                    ("vp_count", int(&hello.vp_count)),
                    (
                        "regions",
                        Value::List(hello.regions().map(region).collect()),
                    ),
                    ("privileges", Value::Int(hello.privileges)),
                    ("flags", int(&hello.flags)),
                    ("version_min", Value::Int(u64::from(hello.version_min))),
                    ("version_max", Value::Int(u64::from(hello.version_max))),
                ];
                ("Hello", fields)
            }
            Self::HelloAck { version, flags } => (
                "HelloAck",
                vec![
                    ("version", Value::Int(u64::from(*version))),
                    ("flags", int(flags)),
                ],
            ),
            Self::Hypercall(call) => {
                let fields = vec![
                    ("vp", int(&call.vp)),
                    ("rcx", Value::Int(call.rcx)),
                    ("rdx", Value::Int(call.rdx)),
                    ("r8", Value::Int(call.r8)),
                    ("xmm", Value::Bytes(call.xmm.to_vec())),
                ];
                ("Hypercall", fields)
            }
            Self::HypercallResult(result) => {
                let fields = vec![
                    ("rax", Value::Int(result.rax)),
                    ("rcx", Value::Int(result.rcx)),
                    ("rdx", Value::Int(result.rdx)),
                    ("r8", Value::Int(result.r8)),
                    ("xmm", Value::Bytes(result.xmm.to_vec())),
                ];
                ("HypercallResult", fields)
            }
            Self::MsrWrite { vp, msr, value } => (
                "MsrWrite",
                vec![
                    ("vp", int(vp)),
                    ("msr", int(msr)),
                    ("value", Value::Int(*value)),
                ],
            ),
            Self::MsrRead { vp, msr } => ("MsrRead", vec![("vp", int(vp)), ("msr", int(msr))]),
            Self::MsrResult { fault, value } => (
                "MsrResult",
                vec![
                    ("fault", Value::Bool(*fault)),
                    ("value", Value::Int(*value)),
                ],
            ),
            Self::Deliver { vp, sint, message } => (
                "Deliver",
                vec![
                    ("vp", int(vp)),
                    ("sint", int(sint)),
                    ("message", Value::Bytes(message.to_vec())),
                ],
            ),
            Self::Eom { vp, sint } => ("Eom", vec![("vp", int(vp)), ("sint", int(sint))]),
            Self::EventFd { connection_id, add } => (
                "EventFd",
                vec![
                    ("connection_id", int(connection_id)),
                    ("add", Value::Bool(*add)),
                ],
            ),
            Self::Park => ("Park", vec![]),
            Self::Parked => ("Parked", vec![]),
            Self::Resume => ("Resume", vec![]),
            Self::Reset => ("Reset", vec![]),
            Self::ResetDone => ("ResetDone", vec![]),
            Self::Configure { document } => (
                "Configure",
                vec![("document", Value::Bytes(document.to_vec()))],
            ),
            Self::Configured { status, text } => (
                "Configured",
                vec![
                    ("status", int(status)),
                    ("text", Value::Text((*text).to_owned())),
                ],
            ),
            Self::Exec { document } => {
                ("Exec", vec![("document", Value::Bytes(document.to_vec()))])
            }
            Self::ExecStarted { status, pid, text } => (
                "ExecStarted",
                vec![
                    ("status", int(status)),
                    ("pid", int(pid)),
                    ("text", Value::Text((*text).to_owned())),
                ],
            ),
            Self::ExecExit { wait_status, text } => (
                "ExecExit",
                vec![
                    ("wait_status", int(wait_status)),
                    ("text", Value::Text((*text).to_owned())),
                ],
            ),
            Self::Kill {
                exec_sequence,
                signal,
            } => (
                "Kill",
                vec![
                    ("exec_sequence", int(exec_sequence)),
                    ("signal", int(signal)),
                ],
            ),
            Self::Shutdown => ("Shutdown", vec![]),
            Self::DoorError { code, text } => (
                "DoorError",
                vec![
                    ("code", int(code)),
                    ("text", Value::Text((*text).to_owned())),
                ],
            ),
        }
    }
}

//! The door as its guest's side sees it (docs/door.md): each frame checked for form, place and descriptors.
//!
//! Nothing here waits or touches the machine: a frame goes in, what is to be done comes out, or a refusal that ends the
//! connection.

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;

use vswitch_wire::door::{
    self, DoorMessage, Hello, DOOR_VERSION, HELLO_RESUME, MESSAGE_SIZE, SINT_COUNT,
};

use crate::memory::Region;

pub const ERROR_MALFORMED: u32 = door::ERROR_MALFORMED;
pub const ERROR_VERSION: u32 = 3;
pub const ERROR_STATE: u32 = 4;
pub const ERROR_RESUME: u32 = 5;
/// EOPNOTSUPP: there is no agent in this guest.
const NO_AGENT: u32 = 95;
const NO_AGENT_TEXT: &str = "this guest runs a kernel of its own and has no agent; use its console";

/// What HELLO said of the partition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    pub partition_id: u64,
    pub vp_count: u32,
    pub privileges: u64,
    pub regions: Vec<Region>,
}

/// The answer to a request of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// RAX of a hypercall.
    Hypercall(u64),
    /// An MSR was read or written, or the access raises #GP; what was read.
    Msr { fault: bool, value: u64 },
}

/// What a frame asks of the machine.
#[derive(Debug)]
pub enum Event {
    Fresh {
        sequence: u32,
        shape: Shape,
        memfds: Vec<OwnedFd>,
        interrupts: Vec<OwnedFd>,
    },
    Resumed {
        sequence: u32,
        interrupts: Vec<OwnedFd>,
    },
    Answered(u32, Answer),
    Deliver {
        vp: u32,
        sint: u32,
        message: Box<[u8; MESSAGE_SIZE]>,
    },
    /// None: the connection is closed.
    EventFd(u32, Option<OwnedFd>),
    Park(u32),
    Run,
    ResetDone(u32),
    /// A frame to send back.
    Reply(Vec<u8>),
    Nothing,
    Shutdown,
    /// The host ended the conversation.
    Ended(String),
}

/// Why the connection ends; the code goes to the host.
#[derive(Debug, PartialEq, Eq)]
pub struct Refusal {
    pub code: u32,
    pub text: String,
}

fn refuse<T>(code: u32, text: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal {
        code,
        text: text.into(),
    })
}

/// One partition's conversations, one connection after the other.
#[derive(Default)]
pub struct Door {
    shape: Option<Shape>,
    greeted: bool,
    /// (VP, SINT) with a DELIVER that no EOM has ended.
    outstanding: BTreeSet<(u32, u32)>,
}

impl Door {
    /// A new connection: whatever was outstanding on the one before is lost.
    pub fn connected(&mut self) {
        self.greeted = false;
        self.outstanding.clear();
    }

    /// EOM goes to the host for this slot; false when nothing was outstanding there.
    pub fn end_of_message(&mut self, vp: u32, sint: u32) -> bool {
        self.outstanding.remove(&(vp, sint))
    }

    /// The host forgets what it delivered.
    pub fn reset(&mut self) {
        self.outstanding.clear();
    }

    /// One whole frame with its descriptors.
    pub fn receive(&mut self, frame: &[u8], fds: Vec<OwnedFd>) -> Result<Event, Refusal> {
        let (sequence, message) = match DoorMessage::parse(frame) {
            Ok(parsed) => parsed,
            Err(error) => return refuse(ERROR_MALFORMED, error.to_string()),
        };
        let expected = match &message {
            DoorMessage::Hello(hello) if hello.flags & HELLO_RESUME != 0 => hello.vp_count as usize,
            DoorMessage::Hello(hello) => hello.vp_count as usize + hello.regions().count(),
            DoorMessage::EventFd { add: true, .. } => 1,
            DoorMessage::Exec { .. } => 3,
            _ => 0,
        };
        if fds.len() != expected {
            let text = format!(
                "door frame type {:#x}: {} descriptors instead of {expected}",
                message.kind(),
                fds.len()
            );
            return refuse(ERROR_MALFORMED, text);
        }
        if let DoorMessage::Hello(hello) = message {
            return self.hello(sequence, &hello, fds);
        }
        if let DoorMessage::DoorError { code, text } = message {
            return Ok(Event::Ended(format!(
                "the host reported error {code}: {text}"
            )));
        }
        let Some(shape) = self.shape.as_ref().filter(|_| self.greeted) else {
            let text = format!("door frame type {:#x} before HELLO", message.kind());
            return refuse(ERROR_STATE, text);
        };
        Ok(match message {
            DoorMessage::HypercallResult(result) => {
                Event::Answered(sequence, Answer::Hypercall(result.rax))
            }
            DoorMessage::MsrResult { fault, value } => {
                Event::Answered(sequence, Answer::Msr { fault, value })
            }
            DoorMessage::Deliver { vp, sint, message } => {
                if vp >= shape.vp_count || sint >= SINT_COUNT {
                    return refuse(
                        ERROR_MALFORMED,
                        format!("DELIVER: no virtual processor {vp}"),
                    );
                }
                if !self.outstanding.insert((vp, sint)) {
                    let text =
                        format!("DELIVER: the last one to VP {vp}, SINT {sint} has not ended");
                    return refuse(ERROR_STATE, text);
                }
                let mut copy = Box::new([0; MESSAGE_SIZE]);
                copy.copy_from_slice(message);
                Event::Deliver {
                    vp,
                    sint,
                    message: copy,
                }
            }
            DoorMessage::EventFd { connection_id, .. } => {
                Event::EventFd(connection_id, fds.into_iter().next())
            }
            DoorMessage::Park => Event::Park(sequence),
            DoorMessage::Resume => Event::Run,
            DoorMessage::ResetDone => Event::ResetDone(sequence),
            DoorMessage::Configure { .. } => reply(
                sequence,
                &DoorMessage::Configured {
                    status: NO_AGENT,
                    text: NO_AGENT_TEXT,
                },
            ),
            DoorMessage::Exec { .. } => reply(
                sequence,
                &DoorMessage::ExecStarted {
                    status: NO_AGENT,
                    pid: 0,
                    text: NO_AGENT_TEXT,
                },
            ),
            DoorMessage::Kill { .. } => Event::Nothing,
            DoorMessage::Shutdown => Event::Shutdown,
            other => {
                let text = format!(
                    "door frame type {:#x} goes from guest to host only",
                    other.kind()
                );
                return refuse(ERROR_MALFORMED, text);
            }
        })
    }

    fn hello(
        &mut self,
        sequence: u32,
        hello: &Hello<'_>,
        fds: Vec<OwnedFd>,
    ) -> Result<Event, Refusal> {
        if self.greeted {
            return refuse(ERROR_STATE, "HELLO twice on one connection");
        }
        if !(hello.version_min..=hello.version_max).contains(&DOOR_VERSION) {
            let text = format!("door version {DOOR_VERSION} is the only one spoken here");
            return refuse(ERROR_VERSION, text);
        }
        let shape = Shape {
            partition_id: hello.partition_id,
            vp_count: hello.vp_count,
            privileges: hello.privileges,
            regions: hello.regions().collect(),
        };
        if hello.flags & HELLO_RESUME == 0 {
            if self.shape.is_some() {
                return refuse(
                    ERROR_STATE,
                    "this machine runs already: resume it, or start another",
                );
            }
            let mut memfds = fds;
            let interrupts = memfds.split_off(shape.regions.len());
            self.shape = Some(shape.clone());
            self.greeted = true;
            return Ok(Event::Fresh {
                sequence,
                shape,
                memfds,
                interrupts,
            });
        }
        if self.shape.as_ref() != Some(&shape) {
            return refuse(
                ERROR_RESUME,
                "the partition to resume is not the one that runs here",
            );
        }
        self.greeted = true;
        Ok(Event::Resumed {
            sequence,
            interrupts: fds,
        })
    }
}

fn reply(sequence: u32, message: &DoorMessage<'_>) -> Event {
    match message.encode(sequence) {
        Ok(frame) => Event::Reply(frame),
        Err(_) => Event::Nothing,
    }
}

//! What was decided about a frame: the form that the flow cache keeps and `execute` follows.

use std::borrow::Cow;
use std::sync::Arc;

use crate::drops::DropReason;
use crate::mac::MacKey;

/// A frame's end, at its source or towards one destination.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Drop {
    pub reason: DropReason,
    pub detail: Cow<'static, str>,
    /// Name of the extension, or `None` for the switch itself.
    pub by: Option<Arc<str>>,
}

impl Drop {
    pub fn new(reason: DropReason, detail: impl Into<Cow<'static, str>>) -> Self {
        Drop {
            reason,
            detail: detail.into(),
            by: None,
        }
    }
}

/// One output; `drop` is the verdict of an egress filter on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Destination {
    pub port_id: u32,
    pub drop: Option<Drop>,
}

/// What to do with a frame, and with all that are equal to it in the fields that were read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Program {
    pub drop: Option<Drop>,
    pub destinations: Vec<Destination>,
    /// Flooded because the destination is unknown.
    pub unknown: bool,
    /// The address that hits keep young.
    pub source: Option<MacKey>,
}

impl Program {
    pub fn dropped(drop: Drop, source: Option<MacKey>) -> Self {
        Program {
            drop: Some(drop),
            source,
            ..Program::default()
        }
    }
}

/// What an extension said. The rest says how far it holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Answer {
    pub drop: Option<Drop>,
    pub fields: u64,
    pub cacheable: bool,
    pub ttl_ns: u64,
}

/// What one stage of the pipeline decided about a traced frame; see `vswitch.engine.TraceStep`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceStep {
    pub stage: &'static str,
    pub verdict: &'static str,
    pub detail: String,
    pub fields: u64,
    pub port_id: Option<u32>,
    pub reason: Option<DropReason>,
    pub by: Option<Arc<str>>,
}

/// `02:00:00:00:00:01`
pub fn mac_text(address: u64) -> String {
    let bytes = address.to_be_bytes();
    let pairs: Vec<String> = bytes[2..]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    pairs.join(":")
}

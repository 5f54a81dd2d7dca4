//! The error that bad bytes from the other side of a door give.

use std::fmt;

/// Bytes that no conforming peer sends. Carries no allocation: a hostile peer can make many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WireError {
    /// The object is cut short.
    Short {
        what: &'static str,
        needed: usize,
        have: usize,
    },
    /// A message type that the protocol does not have.
    Unknown { protocol: &'static str, number: u32 },
    /// A value that breaks a rule of the format.
    Bad {
        what: &'static str,
        why: &'static str,
    },
}

impl fmt::Display for WireError {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            WireError::Short { what, needed, have } => {
                write!(out, "{what}: needs {needed} bytes, has {have}")
            }
            WireError::Unknown { protocol, number } => {
                write!(out, "{protocol}: unknown message type {number:#x}")
            }
            WireError::Bad { what, why } => write!(out, "{what}: {why}"),
        }
    }
}

impl std::error::Error for WireError {}

pub type Result<T> = std::result::Result<T, WireError>;

/// Shorthand for `WireError::Bad`.
pub(crate) fn bad<T>(what: &'static str, why: &'static str) -> Result<T> {
    Err(WireError::Bad { what, why })
}

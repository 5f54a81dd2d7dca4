//! GPADLs: page lists that a guest hands over in one header and any number of body messages.

use std::collections::HashMap;

use crate::error::{bad, Result, WireError};

pub const PAGE_SIZE: usize = 4096;
pub const MAXIMUM_PFN: u64 = (1 << 52) - 1;
pub const GPADL_HEADER_MAX_PFNS: usize = 26;
pub const GPADL_BODY_MAX_PFNS: usize = 28;

/// Pages that a range touches.
pub fn page_count(byte_offset: u32, byte_count: u32) -> usize {
    (byte_offset as usize + byte_count as usize).div_ceil(PAGE_SIZE)
}

/// A range over bytes that are still little-endian page numbers.
#[derive(Clone, Copy, Debug)]
pub struct RangeRef<'a> {
    pub byte_count: u32,
    pub byte_offset: u32,
    pfns: &'a [u8],
}

impl<'a> RangeRef<'a> {
    /// The page numbers, each at most 52 bits.
    pub fn pfns(&self) -> impl ExactSizeIterator<Item = u64> + 'a {
        self.pfns.chunks_exact(8).map(pfn)
    }
}

fn pfn(bytes: &[u8]) -> u64 {
    bytes.try_into().map(u64::from_le_bytes).unwrap_or(u64::MAX)
}

/// Walks range descriptors: `u32 byte count, u32 byte offset, u64 pfn[]`. An error ends the walk.
#[derive(Clone, Debug)]
pub struct RangeIter<'a> {
    what: &'static str,
    data: &'a [u8],
    left: u32,
}

impl<'a> RangeIter<'a> {
    /// `count` ranges from the start of `data`; a count that cannot fit is refused before any work.
    pub fn new(what: &'static str, data: &'a [u8], count: u32) -> Result<Self> {
        if count == 0 {
            return bad(what, "no range");
        }
        if count as usize > data.len() / 16 {
            return bad(what, "its ranges do not fit in its bytes");
        }
        Ok(Self {
            what,
            data,
            left: count,
        })
    }

    /// Bytes not yet walked.
    pub fn rest(&self) -> &'a [u8] {
        self.data
    }

    /// Ranges not yet walked.
    pub fn left(&self) -> u32 {
        self.left
    }

    fn step(&mut self) -> Result<RangeRef<'a>> {
        let Some((head, rest)) = self.data.split_first_chunk::<8>() else {
            return bad(self.what, "a range is cut short");
        };
        let byte_count = u32::from_le_bytes([head[0], head[1], head[2], head[3]]);
        let byte_offset = u32::from_le_bytes([head[4], head[5], head[6], head[7]]);
        if byte_count == 0 {
            return bad(self.what, "a range is empty");
        }
        if byte_offset as usize >= PAGE_SIZE {
            return bad(self.what, "a range starts beyond its first page");
        }
        let Some((pfns, rest)) = rest.split_at_checked(page_count(byte_offset, byte_count) * 8)
        else {
            return bad(self.what, "a page list is cut short");
        };
        if pfns.chunks_exact(8).any(|entry| pfn(entry) > MAXIMUM_PFN) {
            return bad(self.what, "a page number beyond 52 bits");
        }
        self.data = rest;
        Ok(RangeRef {
            byte_count,
            byte_offset,
            pfns,
        })
    }
}

impl<'a> Iterator for RangeIter<'a> {
    type Item = Result<RangeRef<'a>>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.left == 0 {
            return None;
        }
        let step = self.step();
        self.left = if step.is_ok() { self.left - 1 } else { 0 };
        Some(step)
    }
}

/// A range in its own memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GpaRange {
    pub byte_count: u32,
    pub byte_offset: u32,
    pub pfns: Vec<u64>,
}

/// A GPADL whose every range has arrived.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AssembledGpadl {
    pub relid: u32,
    pub gpadl_id: u32,
    pub ranges: Vec<GpaRange>,
}

/// A GPADL that cannot be made; the answer is GPADL_CREATED with these ids and a non-zero status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GpadlError {
    pub relid: u32,
    pub gpadl_id: u32,
    pub error: WireError,
}

/// Why a body was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BodyError {
    /// No GPADL with this id is being made; there is nobody to answer.
    Unknown,
    Refused(GpadlError),
}

/// What of a message belongs to the GPADL: no more than `room`, in whole page numbers.
///
/// Firmware posts 240 bytes always, and a full header has 236: four bytes of it mean nothing.
fn whole(data: &[u8], room: usize) -> &[u8] {
    let length = data.len().min(room) & !7;
    data.get(..length).unwrap_or_default()
}

struct Partial {
    relid: u32,
    range_bytes: usize,
    range_count: u32,
    data: Vec<u8>,
}

/// Collects headers and bodies of one connection. Bounded: `max_in_progress` unfinished GPADLs of at most 64 KiB each.
pub struct GpadlAssembler {
    max_in_progress: usize,
    partial: HashMap<u32, Partial>,
}

const WHAT: &str = "GPADL";

impl GpadlAssembler {
    pub fn new(max_in_progress: usize) -> Self {
        Self {
            max_in_progress,
            partial: HashMap::new(),
        }
    }

    /// Unfinished GPADLs.
    pub fn in_progress(&self) -> usize {
        self.partial.len()
    }

    /// Starts a GPADL; gives it when this one message held all of it.
    pub fn header(
        &mut self,
        relid: u32,
        gpadl_id: u32,
        range_bytes: u16,
        range_count: u16,
        data: &[u8],
    ) -> std::result::Result<Option<AssembledGpadl>, GpadlError> {
        let refuse = |why| {
            Err(GpadlError {
                relid,
                gpadl_id,
                error: WireError::Bad { what: WHAT, why },
            })
        };
        let (range_bytes, range_count) = (usize::from(range_bytes), u32::from(range_count));
        if gpadl_id == 0 {
            return refuse("id 0 is not allowed");
        }
        if self.partial.contains_key(&gpadl_id) {
            return refuse("a GPADL with this id is already being made");
        }
        if range_count == 0 {
            return refuse("no range");
        }
        if !range_bytes.is_multiple_of(8) || range_bytes < 16 * range_count as usize {
            return refuse("its bytes cannot hold its ranges");
        }
        let data = whole(data, range_bytes);
        let mut partial = Partial {
            relid,
            range_bytes,
            range_count,
            data: Vec::new(),
        };
        if data.len() == range_bytes {
            partial.data.extend_from_slice(data);
            return finish(gpadl_id, &partial).map(Some);
        }
        if self.partial.len() >= self.max_in_progress {
            return refuse("too many GPADLs are unfinished");
        }
        partial.data.reserve_exact(range_bytes);
        partial.data.extend_from_slice(data);
        self.partial.insert(gpadl_id, partial);
        Ok(None)
    }

    /// Adds a body; gives the GPADL when it is whole.
    pub fn body(
        &mut self,
        gpadl_id: u32,
        data: &[u8],
    ) -> std::result::Result<Option<AssembledGpadl>, BodyError> {
        let Some(partial) = self.partial.get_mut(&gpadl_id) else {
            return Err(BodyError::Unknown);
        };
        let data = whole(data, partial.range_bytes - partial.data.len());
        if data.is_empty() {
            let relid = partial.relid;
            self.partial.remove(&gpadl_id);
            let error = WireError::Bad {
                what: WHAT,
                why: "a body message without a page number",
            };
            return Err(BodyError::Refused(GpadlError {
                relid,
                gpadl_id,
                error,
            }));
        }
        partial.data.extend_from_slice(data);
        if partial.data.len() < partial.range_bytes {
            return Ok(None);
        }
        match self.partial.remove(&gpadl_id) {
            Some(partial) => finish(gpadl_id, &partial)
                .map(Some)
                .map_err(BodyError::Refused),
            None => Err(BodyError::Unknown),
        }
    }

    /// Forgets an unfinished GPADL; false if there was none.
    pub fn discard(&mut self, gpadl_id: u32) -> bool {
        self.partial.remove(&gpadl_id).is_some()
    }

    /// Forgets a channel's unfinished GPADLs and gives their ids in ascending order.
    pub fn discard_channel(&mut self, relid: u32) -> Vec<u32> {
        let mut gone: Vec<u32> = self
            .partial
            .iter()
            .filter(|(_, partial)| partial.relid == relid)
            .map(|(id, _)| *id)
            .collect();
        gone.sort_unstable();
        for id in &gone {
            self.partial.remove(id);
        }
        gone
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.partial.clear();
    }
}

fn finish(gpadl_id: u32, partial: &Partial) -> std::result::Result<AssembledGpadl, GpadlError> {
    let relid = partial.relid;
    let refuse = |error| GpadlError {
        relid,
        gpadl_id,
        error,
    };
    let mut walk = RangeIter::new(WHAT, &partial.data, partial.range_count).map_err(refuse)?;
    let mut ranges = Vec::with_capacity(partial.range_count as usize);
    for range in walk.by_ref() {
        let range = range.map_err(refuse)?;
        ranges.push(GpaRange {
            byte_count: range.byte_count,
            byte_offset: range.byte_offset,
            pfns: range.pfns().collect(),
        });
    }
    if !walk.rest().is_empty() {
        return Err(refuse(WireError::Bad {
            what: WHAT,
            why: "its ranges take fewer bytes than announced",
        }));
    }
    Ok(AssembledGpadl {
        relid,
        gpadl_id,
        ranges,
    })
}

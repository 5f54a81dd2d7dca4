//! The VMBus ring buffer: producer and consumer over shared guest pages.
//!
//! A reader copies each packet out of guest memory once, checks it, and hands out the private copy. A writer puts packets
//! behind each other and publishes them with one `commit` per batch. `commit` says whether the peer must be signalled.
//! A `RingError` is fatal to the channel: the peer broke the protocol.

#![forbid(unsafe_code)]

use std::fmt;
use std::sync::atomic::{fence, Ordering};

use vswitch_memory::{BufferView, MemoryError, Word};
use vswitch_wire::packet::{
    self, Descriptor, GpaRangeRef, PacketRef, TransferRange, DESCRIPTOR_SIZE, TRAILER_SIZE,
};
use vswitch_wire::WireError;

pub mod protocol;

use protocol::{Consumer, Control, Field, Producer};

pub const CONTROL_SIZE: usize = 4096;

/// The peer lies, or the caller asks for what can never be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RingError {
    /// A peer's index beyond the ring or not a multiple of 8.
    Index {
        name: &'static str,
        value: u32,
        size: u32,
    },
    /// A peer's index that did not move forward.
    WentBack {
        name: &'static str,
        from: u32,
        to: u32,
    },
    /// A packet whose length does not fit what is there.
    Packet {
        length: usize,
        available: usize,
    },
    /// A packet that breaks the packet format.
    Malformed(WireError),
    /// A packet that this ring can never hold.
    NeverFits {
        needed: u32,
        size: u32,
    },
    /// A ring that is not a control page and whole data pages.
    Geometry {
        size: usize,
    },
    Memory(MemoryError),
}

impl fmt::Display for RingError {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RingError::Index { name, value, size } => {
                write!(out, "ring: the peer's {name} index {value} is not a multiple of 8 below {size}")
            }
            RingError::WentBack { name, from, to } => {
                write!(out, "ring: the peer's {name} index went back from {from} to {to}")
            }
            RingError::Packet { length, available } => {
                write!(out, "ring: packet of {length} bytes, {available} bytes are there")
            }
            RingError::Malformed(error) => write!(out, "ring: {error}"),
            RingError::NeverFits { needed, size } => {
                write!(out, "ring: {needed} bytes never fit in a data area of {size}")
            }
            RingError::Geometry { size } => write!(
                out,
                "ring of {size} bytes: expected a control page and at least one whole data page, below 2 GiB"
            ),
            RingError::Memory(error) => write!(out, "ring: {error}"),
        }
    }
}

impl std::error::Error for RingError {}

impl From<MemoryError> for RingError {
    fn from(error: MemoryError) -> Self {
        RingError::Memory(error)
    }
}

impl From<WireError> for RingError {
    fn from(error: WireError) -> Self {
        RingError::Malformed(error)
    }
}

/// The control words in guest memory.
struct SharedControl {
    write: Word,
    read: Word,
    mask: Word,
    pending: Word,
    features: Word,
}

impl SharedControl {
    fn new(view: &BufferView) -> Result<Self, RingError> {
        Ok(Self {
            write: view.word(Field::WriteIndex as usize)?,
            read: view.word(Field::ReadIndex as usize)?,
            mask: view.word(Field::InterruptMask as usize)?,
            pending: view.word(Field::PendingSendSize as usize)?,
            features: view.word(Field::FeatureBits as usize)?,
        })
    }

    #[inline]
    fn word(&self, field: Field) -> &Word {
        match field {
            Field::WriteIndex => &self.write,
            Field::ReadIndex => &self.read,
            Field::InterruptMask => &self.mask,
            Field::PendingSendSize => &self.pending,
            Field::FeatureBits => &self.features,
        }
    }
}

impl Control for SharedControl {
    #[inline]
    fn load(&self, field: Field) -> u32 {
        self.word(field).load()
    }

    #[inline]
    fn store(&self, field: Field, value: u32) {
        self.word(field).store(value);
    }

    #[inline]
    fn fence(&self) {
        fence(Ordering::SeqCst);
    }
}

/// The data area's size of the ring in `view`.
fn data_size(view: &BufferView) -> Result<u32, RingError> {
    let size = view.len().saturating_sub(CONTROL_SIZE);
    if size == 0 || !size.is_multiple_of(CONTROL_SIZE) || size >= 1 << 31 {
        return Err(RingError::Geometry { size: view.len() });
    }
    u32::try_from(size).map_err(|_| RingError::Geometry { size: view.len() })
}

/// The consuming side of a ring. One owner.
pub struct RingReader {
    view: BufferView,
    state: Consumer<SharedControl>,
}

impl RingReader {
    /// `view` covers the control page and the data pages.
    pub fn new(view: BufferView) -> Result<Self, RingError> {
        let size = data_size(&view)?;
        let state = Consumer::new(SharedControl::new(&view)?, size)?;
        Ok(Self { view, state })
    }

    /// Bytes of the data area.
    pub fn size(&self) -> u32 {
        self.state.size()
    }

    /// Whether there is a packet to read.
    pub fn pending(&mut self) -> Result<bool, RingError> {
        Ok(self.state.available()? != 0)
    }

    #[inline]
    fn copy_out(&self, index: usize, into: &mut [u8]) -> Result<(), RingError> {
        let first = into.len().min(self.state.size() as usize - index);
        let (head, tail) = into.split_at_mut(first);
        self.view.read(CONTROL_SIZE + index, head)?;
        if !tail.is_empty() {
            self.view.read(CONTROL_SIZE, tail)?;
        }
        Ok(())
    }

    /// Copies the next packet into `scratch` (resized to it) and gives it, or None when there is none.
    ///
    /// Its space returns to the writer with `commit`. `scratch` is meant to be reused.
    pub fn next<'a>(
        &mut self,
        scratch: &'a mut Vec<u8>,
    ) -> Result<Option<PacketRef<'a>>, RingError> {
        let available = self.state.available()? as usize;
        if available == 0 {
            return Ok(None);
        }
        if available < DESCRIPTOR_SIZE + TRAILER_SIZE {
            return Err(RingError::Packet {
                length: 0,
                available,
            });
        }
        let position = self.state.position() as usize;
        let mut head = [0u8; DESCRIPTOR_SIZE];
        self.copy_out(position, &mut head)?;
        let descriptor = Descriptor::parse(&head)?;
        if descriptor.length + TRAILER_SIZE > available {
            return Err(RingError::Packet {
                length: descriptor.length,
                available,
            });
        }
        // The descriptor that was checked is the one that is used: the writer may change the shared one.
        scratch.resize(descriptor.length, 0);
        let (front, rest) = scratch.split_at_mut(DESCRIPTOR_SIZE);
        front.copy_from_slice(&head);
        if !rest.is_empty() {
            let size = self.state.size() as usize;
            let at = if position + DESCRIPTOR_SIZE >= size {
                position + DESCRIPTOR_SIZE - size
            } else {
                position + DESCRIPTOR_SIZE
            };
            self.copy_out(at, rest)?;
        }
        self.state
            .advance((descriptor.length + TRAILER_SIZE) as u32);
        Ok(Some(PacketRef::parse(scratch)?))
    }

    /// Returns the space of all packets read; true when the peer waits for it and must be signalled.
    pub fn commit(&mut self) -> Result<bool, RingError> {
        self.state.commit()
    }

    /// Tells the writer not to signal while this side drains.
    pub fn mask(&self) {
        self.state.mask();
    }

    /// Asks for signals again; true when data arrived meanwhile: mask again and read on.
    pub fn unmask(&mut self) -> Result<bool, RingError> {
        self.state.unmask()
    }
}

/// The producing side of a ring. One owner.
pub struct RingWriter {
    view: BufferView,
    state: Producer<SharedControl>,
    scratch: Vec<u8>,
}

impl RingWriter {
    /// `view` covers the control page and the data pages. Sets the feature bit, clears the pending send size.
    pub fn new(view: BufferView) -> Result<Self, RingError> {
        let size = data_size(&view)?;
        let state = Producer::new(SharedControl::new(&view)?, size)?;
        Ok(Self {
            view,
            state,
            scratch: Vec::with_capacity(256),
        })
    }

    /// Bytes of the data area.
    pub fn size(&self) -> u32 {
        self.state.size()
    }

    /// Largest packet that can ever be written, without trailer.
    pub fn capacity(&self) -> usize {
        self.state.size() as usize - 8 - TRAILER_SIZE
    }

    /// Bytes free now: a packet of n bytes (without trailer) fits when n + 8 < free.
    pub fn free(&mut self) -> Result<u32, RingError> {
        self.state.free()
    }

    fn put(&mut self) -> Result<bool, RingError> {
        let length = self.scratch.len();
        let needed = u32::try_from(length + TRAILER_SIZE).unwrap_or(u32::MAX);
        let Some(start) = self.state.reserve(needed)? else {
            return Ok(false);
        };
        self.scratch.extend_from_slice(&[0; 4]);
        self.scratch.extend_from_slice(&start.to_le_bytes());
        let first = self.scratch.len().min((self.state.size() - start) as usize);
        let (head, tail) = self.scratch.split_at(first);
        self.view.write(CONTROL_SIZE + start as usize, head)?;
        if !tail.is_empty() {
            self.view.write(CONTROL_SIZE, tail)?;
        }
        Ok(true)
    }

    /// Puts a whole packet (descriptor to padding) behind those not yet committed. False when it does not fit now: then
    /// the pending send size is set and the reader will signal when space is there.
    pub fn write(&mut self, packet: &[u8]) -> Result<bool, RingError> {
        if packet.len() < DESCRIPTOR_SIZE || !packet.len().is_multiple_of(8) {
            return Err(WireError::Bad {
                what: "VMBus packet",
                why: "expected a multiple of 8, at least 16",
            }
            .into());
        }
        self.scratch.clear();
        self.scratch.extend_from_slice(packet);
        self.put()
    }

    /// As `write`, for an in-band packet.
    pub fn write_inband(
        &mut self,
        payload: &[u8],
        transaction_id: u64,
        completion: bool,
    ) -> Result<bool, RingError> {
        packet::encode_inband(&mut self.scratch, payload, transaction_id, completion)?;
        self.put()
    }

    /// As `write`, for a completion.
    pub fn write_completion(
        &mut self,
        transaction_id: u64,
        payload: &[u8],
    ) -> Result<bool, RingError> {
        packet::encode_completion(&mut self.scratch, transaction_id, payload)?;
        self.put()
    }

    /// As `write`, for a packet that refers to ranges of a transfer page set.
    pub fn write_transfer_pages(
        &mut self,
        transaction_id: u64,
        set_id: u16,
        ranges: &[TransferRange],
        payload: &[u8],
        completion: bool,
    ) -> Result<bool, RingError> {
        packet::encode_transfer_pages(
            &mut self.scratch,
            transaction_id,
            set_id,
            ranges,
            payload,
            completion,
        )?;
        self.put()
    }

    /// As `write`, for a packet that refers to guest pages.
    pub fn write_gpa_direct(
        &mut self,
        transaction_id: u64,
        ranges: &[GpaRangeRef<'_>],
        payload: &[u8],
        completion: bool,
    ) -> Result<bool, RingError> {
        packet::encode_gpa_direct(
            &mut self.scratch,
            transaction_id,
            ranges,
            payload,
            completion,
        )?;
        self.put()
    }

    /// Publishes what was written; true when the peer must be signalled.
    pub fn commit(&mut self) -> Result<bool, RingError> {
        self.state.commit()
    }
}

//! Indices, interrupt mask and pending send size: the shared-memory protocol of a ring, apart from its bytes.
//!
//! Generic over where the control words live, so that the same code runs over guest memory and under loom.

use crate::RingError;

/// The control words of a ring, at their byte offsets in the control page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Field {
    WriteIndex = 0,
    ReadIndex = 4,
    InterruptMask = 8,
    PendingSendSize = 12,
    FeatureBits = 64,
}

pub const FEATURE_PENDING_SEND_SIZE: u32 = 1;

/// Access to the control words: acquire loads, release stores, a full fence.
pub trait Control {
    fn load(&self, field: Field) -> u32;
    fn store(&self, field: Field, value: u32);
    fn fence(&self);
}

#[inline]
fn distance(from: u32, to: u32, size: u32) -> u32 {
    if to >= from {
        to - from
    } else {
        to + (size - from)
    }
}

#[inline]
fn advance(index: u32, bytes: u32, size: u32) -> u32 {
    let next = index + bytes;
    if next >= size {
        next - size
    } else {
        next
    }
}

#[inline]
fn checked(value: u32, size: u32, name: &'static str) -> Result<u32, RingError> {
    if value >= size || !value.is_multiple_of(8) {
        return Err(RingError::Index { name, value, size });
    }
    Ok(value)
}

/// The writer's private state.
pub struct Producer<C> {
    pub control: C,
    size: u32,
    published: u32,
    write: u32,
    peer_read: u32,
    blocked: bool,
}

impl<C: Control> Producer<C> {
    /// `size` is the data area's, a multiple of 8 below 2^31.
    pub fn new(control: C, size: u32) -> Result<Self, RingError> {
        let published = checked(control.load(Field::WriteIndex), size, "write")?;
        let peer_read = checked(control.load(Field::ReadIndex), size, "read")?;
        control.store(Field::PendingSendSize, 0);
        let features = control.load(Field::FeatureBits);
        control.store(Field::FeatureBits, features | FEATURE_PENDING_SEND_SIZE);
        Ok(Self {
            control,
            size,
            published,
            write: published,
            peer_read,
            blocked: false,
        })
    }

    pub fn size(&self) -> u32 {
        self.size
    }

    /// Reads the peer's index once and checks that it only moved forward through what was published.
    fn reload(&mut self) -> Result<u32, RingError> {
        let read = checked(self.control.load(Field::ReadIndex), self.size, "read")?;
        let before = distance(self.peer_read, self.published, self.size);
        if distance(read, self.published, self.size) > before {
            return Err(RingError::WentBack {
                name: "read",
                from: self.peer_read,
                to: read,
            });
        }
        self.peer_read = read;
        Ok(read)
    }

    fn known_free(&self) -> u32 {
        self.size - distance(self.peer_read, self.write, self.size)
    }

    /// Bytes free now; `needed` bytes fit when they are fewer.
    pub fn free(&mut self) -> Result<u32, RingError> {
        self.reload()?;
        Ok(self.known_free())
    }

    /// Takes `needed` bytes and gives their index; None when they do not fit now: then the reader is asked to signal.
    pub fn reserve(&mut self, needed: u32) -> Result<Option<u32>, RingError> {
        if needed >= self.size {
            return Err(RingError::NeverFits {
                needed,
                size: self.size,
            });
        }
        if self.known_free() <= needed && self.free()? <= needed {
            self.control.store(Field::PendingSendSize, needed);
            self.blocked = true;
            self.control.fence();
            if self.free()? <= needed {
                return Ok(None);
            }
        }
        if self.blocked {
            self.control.store(Field::PendingSendSize, 0);
            self.blocked = false;
        }
        let start = self.write;
        self.write = advance(start, needed, self.size);
        Ok(Some(start))
    }

    /// Publishes what was reserved and filled; true when the peer must be signalled.
    pub fn commit(&mut self) -> Result<bool, RingError> {
        let before = self.published;
        if self.write == before {
            return Ok(false);
        }
        // Checked against the old write index: that is all the reader could have consumed until now.
        self.reload()?;
        self.control.store(Field::WriteIndex, self.write);
        self.published = self.write;
        self.control.fence();
        if self.control.load(Field::InterruptMask) != 0 {
            return Ok(false);
        }
        Ok(self.reload()? == before)
    }
}

/// The reader's private state.
pub struct Consumer<C> {
    pub control: C,
    size: u32,
    published: u32,
    read: u32,
    peer_write: u32,
}

impl<C: Control> Consumer<C> {
    /// `size` is the data area's, a multiple of 8 below 2^31.
    pub fn new(control: C, size: u32) -> Result<Self, RingError> {
        let read = checked(control.load(Field::ReadIndex), size, "read")?;
        Ok(Self {
            control,
            size,
            published: read,
            read,
            peer_write: read,
        })
    }

    pub fn size(&self) -> u32 {
        self.size
    }

    /// Where the next byte to read is.
    pub fn position(&self) -> u32 {
        self.read
    }

    fn reload(&mut self) -> Result<u32, RingError> {
        let write = checked(self.control.load(Field::WriteIndex), self.size, "write")?;
        if distance(self.read, write, self.size) < distance(self.read, self.peer_write, self.size) {
            return Err(RingError::WentBack {
                name: "write",
                from: self.peer_write,
                to: write,
            });
        }
        self.peer_write = write;
        Ok(write)
    }

    /// Bytes known to be there; looks at the shared index only when none are.
    #[inline]
    pub fn available(&mut self) -> Result<u32, RingError> {
        let known = distance(self.read, self.peer_write, self.size);
        if known != 0 {
            return Ok(known);
        }
        let write = self.reload()?;
        Ok(distance(self.read, write, self.size))
    }

    /// Passes over `bytes` that `available` said are there.
    #[inline]
    pub fn advance(&mut self, bytes: u32) {
        self.read = advance(self.read, bytes, self.size);
    }

    /// Returns the space of all that was read; true when the writer waits for space and now has enough.
    pub fn commit(&mut self) -> Result<bool, RingError> {
        let freed = distance(self.published, self.read, self.size);
        if freed == 0 {
            return Ok(false);
        }
        self.control.store(Field::ReadIndex, self.read);
        self.published = self.read;
        self.control.fence();
        if self.control.load(Field::FeatureBits) & FEATURE_PENDING_SEND_SIZE == 0 {
            return Ok(false);
        }
        // Some guests ask for ring size - 1: sizes count in eights.
        let wanted = self.control.load(Field::PendingSendSize) & !7;
        if wanted == 0 {
            return Ok(false);
        }
        let write = self.reload()?;
        let free_after = i64::from(self.size - distance(self.read, write, self.size));
        let free_before = free_after - i64::from(freed);
        // Stock readers differ in which of the two comparisons is strict; signalling in both cases suits every writer.
        Ok(free_before <= i64::from(wanted) && i64::from(wanted) <= free_after)
    }

    /// Tells the writer not to signal while this side drains.
    pub fn mask(&self) {
        self.control.store(Field::InterruptMask, 1);
    }

    /// Asks for signals again; true when there is something to read: mask again and read on.
    pub fn unmask(&mut self) -> Result<bool, RingError> {
        self.control.store(Field::InterruptMask, 0);
        self.control.fence();
        Ok(self.reload()? != self.read)
    }
}

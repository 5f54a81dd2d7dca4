//! Checked little-endian access to byte slices.

use crate::error::{Result, WireError};

/// A cursor-free reader: every access names its offset and is checked.
#[derive(Clone, Copy)]
pub(crate) struct Bytes<'a> {
    what: &'static str,
    data: &'a [u8],
}

impl<'a> Bytes<'a> {
    /// Wraps `data`, which must hold at least `needed` bytes.
    pub(crate) fn new(what: &'static str, data: &'a [u8], needed: usize) -> Result<Self> {
        if data.len() < needed {
            return Err(WireError::Short {
                what,
                needed,
                have: data.len(),
            });
        }
        Ok(Self { what, data })
    }

    fn array<const N: usize>(&self, offset: usize) -> Result<[u8; N]> {
        let end = offset.checked_add(N);
        match end
            .and_then(|end| self.data.get(offset..end))
            .and_then(|bytes| bytes.try_into().ok())
        {
            Some(bytes) => Ok(bytes),
            None => Err(WireError::Short {
                what: self.what,
                needed: offset.saturating_add(N),
                have: self.data.len(),
            }),
        }
    }

    pub(crate) fn u8(&self, offset: usize) -> Result<u8> {
        Ok(self.array::<1>(offset)?[0])
    }

    pub(crate) fn u16(&self, offset: usize) -> Result<u16> {
        Ok(u16::from_le_bytes(self.array(offset)?))
    }

    pub(crate) fn u32(&self, offset: usize) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array(offset)?))
    }

    pub(crate) fn u64(&self, offset: usize) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array(offset)?))
    }

    pub(crate) fn bytes<const N: usize>(&self, offset: usize) -> Result<[u8; N]> {
        self.array(offset)
    }

    pub(crate) fn slice(&self, offset: usize, length: usize) -> Result<&'a [u8]> {
        let end = offset.checked_add(length);
        match end.and_then(|end| self.data.get(offset..end)) {
            Some(bytes) => Ok(bytes),
            None => Err(WireError::Short {
                what: self.what,
                needed: offset.saturating_add(length),
                have: self.data.len(),
            }),
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.data.len()
    }
}

/// Appends `value`.
pub(crate) trait Put {
    fn put_u8(&mut self, value: u8);
    fn put_u16(&mut self, value: u16);
    fn put_u32(&mut self, value: u32);
    fn put_u64(&mut self, value: u64);
    fn put_zeros(&mut self, count: usize);
}

impl Put for Vec<u8> {
    fn put_u8(&mut self, value: u8) {
        self.push(value);
    }

    fn put_u16(&mut self, value: u16) {
        self.extend_from_slice(&value.to_le_bytes());
    }

    fn put_u32(&mut self, value: u32) {
        self.extend_from_slice(&value.to_le_bytes());
    }

    fn put_u64(&mut self, value: u64) {
        self.extend_from_slice(&value.to_le_bytes());
    }

    fn put_zeros(&mut self, count: usize) {
        self.resize(self.len() + count, 0);
    }
}

//! Fixed layouts as structs: each field names its offset, and knows how to show itself to tests and tools.

use crate::bytes::Bytes;

/// A field's value, for those who show messages rather than act on them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    None,
    Bool(bool),
    Int(u64),
    Guid([u8; 16]),
    Bytes(Vec<u8>),
    Text(String),
    List(Vec<Value>),
    Record(Vec<(&'static str, Value)>),
}

/// A message by name and fields; names are those of the Python twin.
pub type Shown = (&'static str, Vec<(&'static str, Value)>);

/// A type that stands at a fixed offset.
pub(crate) trait Field: Sized {
    fn get(bytes: &Bytes<'_>, offset: usize) -> crate::Result<Self>;
    fn put(&self, out: &mut Vec<u8>);
    fn show(&self) -> Value;
}

macro_rules! integer {
    ($type:ident) => {
        impl Field for $type {
            fn get(bytes: &Bytes<'_>, offset: usize) -> crate::Result<Self> {
                bytes.$type(offset)
            }
            fn put(&self, out: &mut Vec<u8>) {
                out.extend_from_slice(&self.to_le_bytes());
            }
            fn show(&self) -> Value {
                Value::Int(u64::from(*self))
            }
        }
    };
}

integer!(u8);
integer!(u16);
integer!(u32);
integer!(u64);

/// A GUID as it stands on the wire: u32 LE, u16 LE, u16 LE, 8 raw bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Guid(pub [u8; 16]);

impl Field for Guid {
    fn get(bytes: &Bytes<'_>, offset: usize) -> crate::Result<Self> {
        Ok(Guid(bytes.bytes(offset)?))
    }
    fn put(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.0);
    }
    fn show(&self) -> Value {
        Value::Guid(self.0)
    }
}

/// Declares a message with a fixed layout: `Name [size] { field: type @ offset, .. }`, offsets from the message's start.
macro_rules! record {
    ($(#[$doc:meta])* $name:ident [$size:literal] { $($field:ident : $kind:ty => $at:literal),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub struct $name { $(pub $field: $kind),* }

        impl $name {
            /// Bytes that the message needs.
            pub const SIZE: usize = $size;

            /// Decodes the message; bytes beyond it are ignored.
            #[allow(unused_variables)]
            pub fn parse(data: &[u8]) -> $crate::Result<Self> {
                let bytes = $crate::bytes::Bytes::new(stringify!($name), data, Self::SIZE)?;
                Ok(Self { $($field: <$kind as $crate::record::Field>::get(&bytes, $at)?),* })
            }

            /// Appends the fields to a message that starts at `start` of `out`, whose head is there already.
            pub fn put(&self, out: &mut Vec<u8>, start: usize) {
                $(
                    out.resize(start + $at, 0);
                    <$kind as $crate::record::Field>::put(&self.$field, out);
                )*
                out.resize(start + Self::SIZE, 0);
            }

            pub(crate) fn show(&self) -> $crate::record::Shown {
                (stringify!($name), vec![$((stringify!($field), <$kind as $crate::record::Field>::show(&self.$field))),*])
            }
        }
    };
}

pub(crate) use record;

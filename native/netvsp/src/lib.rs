//! The host end of a synthetic NIC's data path: rings in, frames out, and back.

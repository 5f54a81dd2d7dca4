//! The guest end of a synthetic NIC's data path: TAP to ring and back.

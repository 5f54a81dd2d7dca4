//! The VMBus ring buffer: producer and consumer over shared guest pages.

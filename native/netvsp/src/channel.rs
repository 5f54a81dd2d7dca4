//! The control half of a channel: commands down, control messages up.

use std::collections::BTreeSet;
use std::os::fd::RawFd;
use std::sync::{Arc, Mutex};

use vswitch_memory::{BufferView, GuestMemory, Interrupt};
use vswitch_ring::{RingReader, RingWriter};

use crate::endpoint::ChannelEndpoint;
use crate::limits::{CONTROL_RESERVE, MAX_QUEUES};
use crate::queue::Rings;
use crate::rss::Rss;
pub use crate::rss::KEY_BYTES;
use crate::shared::{lock, Command, Shared};

const PAGE: usize = 4096;

/// Why a channel cannot be opened or a buffer cannot be used.
#[derive(Debug)]
pub struct ChannelError(pub String);

impl std::fmt::Display for ChannelError {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str(&self.0)
    }
}

impl std::error::Error for ChannelError {}

fn error(cause: impl std::fmt::Display) -> ChannelError {
    ChannelError(cause.to_string())
}

/// Pages of guest memory that a buffer lies in.
#[derive(Clone, Copy)]
pub struct Pages<'a> {
    pub pfns: &'a [u64],
    pub byte_offset: usize,
    pub byte_count: usize,
}

/// Rings of queue `index`: `ring_pfns` up to `downstream` carry guest to host, the rest host to guest.
fn map_rings(
    memory: &GuestMemory,
    index: usize,
    ring_pfns: &[u64],
    downstream: usize,
    interrupt: Arc<Interrupt>,
) -> Result<Rings, ChannelError> {
    let pages = ring_pfns.len();
    if downstream < 2 || downstream + 2 > pages {
        return Err(ChannelError(format!(
            "downstream ring at page {downstream} of {pages}: each ring needs two"
        )));
    }
    let (up, down) = ring_pfns.split_at(downstream);
    let view = |pfns: &[u64]| memory.view(pfns, 0, pfns.len() * PAGE).map_err(error);
    Ok(Rings {
        index,
        reader: RingReader::new(view(up)?).map_err(error)?,
        writer: RingWriter::new(view(down)?).map_err(error)?,
        interrupt,
    })
}

/// The control plane's handle of a channel; see the crate's head for its life.
pub struct Channel {
    /// None = closed.
    memory: Mutex<Option<Arc<GuestMemory>>>,
    shared: Arc<Shared>,
    endpoint: Mutex<Option<ChannelEndpoint>>,
    /// Sub-channels that are open.
    open: Mutex<BTreeSet<usize>>,
}

impl Channel {
    /// Maps the primary channel's rings: `ring_pfns` up to `downstream` carry guest to host, the rest host to guest.
    /// `doorbell` is signalled for all queues.
    pub fn open(
        memory: Arc<GuestMemory>,
        ring_pfns: &[u64],
        downstream: usize,
        doorbell: RawFd,
        interrupt: Arc<Interrupt>,
    ) -> Result<Self, ChannelError> {
        let rings = map_rings(&memory, 0, ring_pfns, downstream, interrupt)?;
        let shared = Arc::new(Shared::new(doorbell).map_err(error)?);
        let endpoint = ChannelEndpoint::new(Arc::clone(&memory), rings, Arc::clone(&shared));
        Ok(Channel {
            memory: Mutex::new(Some(memory)),
            shared,
            endpoint: Mutex::new(Some(endpoint)),
            open: Mutex::default(),
        })
    }

    /// The worker's half; None when it was taken before.
    pub fn endpoint(&self) -> Option<ChannelEndpoint> {
        lock(&self.endpoint).take()
    }

    fn memory(&self) -> Result<Arc<GuestMemory>, ChannelError> {
        let memory = lock(&self.memory).clone();
        memory.ok_or_else(|| error("the channel is closed"))
    }

    fn view(&self, pages: Pages<'_>) -> Result<BufferView, ChannelError> {
        let memory = self.memory()?;
        let view = memory.view(pages.pfns, pages.byte_offset, pages.byte_count);
        view.map_err(error)
    }

    /// What the worker hands up.
    pub fn shared(&self) -> &Shared {
        &self.shared
    }

    pub fn send_inband(&self, payload: Vec<u8>, transaction_id: u64, completion: bool) {
        self.shared.command(Command::Inband {
            payload,
            transaction_id,
            completion,
        });
    }

    pub fn send_completion(&self, transaction_id: u64, payload: Vec<u8>) {
        self.shared.command(Command::Complete {
            transaction_id,
            payload,
        });
    }

    pub fn send_rndis(&self, message: Vec<u8>) {
        self.shared.command(Command::Rndis(message));
    }

    pub fn set_receive_buffer(
        &self,
        pages: Pages<'_>,
        id: u16,
        size: usize,
        count: usize,
    ) -> Result<(), ChannelError> {
        let needed = size.checked_mul(count);
        if needed.is_none_or(|needed| needed > pages.byte_count) || count <= CONTROL_RESERVE {
            return Err(ChannelError(format!(
                "{count} sub-allocations of {size} bytes in a receive buffer of {}",
                pages.byte_count
            )));
        }
        let view = self.view(pages)?;
        self.shared.command(Command::ReceiveBuffer {
            view,
            id,
            size,
            count,
        });
        Ok(())
    }

    pub fn set_send_buffer(
        &self,
        pages: Pages<'_>,
        section_size: usize,
    ) -> Result<(), ChannelError> {
        let view = self.view(pages)?;
        self.shared
            .command(Command::SendBuffer { view, section_size });
        Ok(())
    }

    pub fn revoke_receive_buffer(&self) {
        self.shared.command(Command::RevokeReceiveBuffer);
    }

    pub fn revoke_send_buffer(&self) {
        self.shared.command(Command::RevokeSendBuffer);
    }

    pub fn set_data(&self, enabled: bool) {
        self.shared.command(Command::Data(enabled));
    }

    pub fn set_link(&self, up: bool) {
        self.shared.command(Command::Link(up));
    }

    pub fn set_filter(&self, bits: u32, address: [u8; 6]) {
        self.shared.command(Command::Filter { bits, address });
    }

    pub fn set_offload(&self, bits: u32) {
        self.shared.command(Command::Offload(bits));
    }

    pub fn set_mtu(&self, mtu: usize) {
        self.shared.command(Command::Mtu(mtu));
    }

    /// Spreads frames over the queues by the guest's parameters; an empty table ends that.
    pub fn set_rss(&self, key: &[u8; KEY_BYTES], table: Vec<u32>, types: u32) {
        let rss = Rss::new(key, table, types).map(Box::new);
        self.shared.command(Command::Rss(rss));
    }

    /// Takes the rings of sub-channel `index`, which is not open, into use.
    pub fn open_queue(
        &self,
        index: usize,
        ring_pfns: &[u64],
        downstream: usize,
        interrupt: Arc<Interrupt>,
    ) -> Result<(), ChannelError> {
        if !(1..MAX_QUEUES).contains(&index) || !lock(&self.open).insert(index) {
            return Err(ChannelError(format!(
                "queue {index} is open already or out of range"
            )));
        }
        let rings = self
            .memory()
            .and_then(|memory| map_rings(&memory, index, ring_pfns, downstream, interrupt));
        match rings {
            Ok(rings) => {
                self.shared.note_queue(index);
                self.shared.command(Command::OpenQueue(Box::new(rings)));
                Ok(())
            }
            Err(error) => {
                lock(&self.open).remove(&index);
                Err(error)
            }
        }
    }

    /// Lets go of a sub-channel's rings; the control message `Closed` says that it has happened.
    pub fn close_queue(&self, index: usize) {
        lock(&self.open).remove(&index);
        self.shared.command(Command::CloseQueue(index));
    }

    /// Lets go of the guest's memory and of an endpoint that was never attached; one that was lets go when it is dropped.
    pub fn close(&self) {
        lock(&self.memory).take();
        drop(self.endpoint());
    }
}

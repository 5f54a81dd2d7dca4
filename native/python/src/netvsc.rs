//! Python surface of the `vswitch-netvsc` crate: one `Worker` per virtual processor, one `DataPath` per channel.

use std::collections::HashMap;
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

use pyo3::exceptions::{PyOSError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use vswitch_memory::{BufferView, GuestMemory, MemoryError};
use vswitch_netvsc::frames;
use vswitch_netvsc::link::Link;
use vswitch_netvsc::path::{Control, Kind, Path, Shared, BOUNCE_PAGES, COUNTERS};
use vswitch_netvsc::worker::{owned_eventfd, Worker};
use vswitch_ring::RingError;

use crate::memory::PyGuestMemory;

pyo3::import_exception!(vswitch_wire.errors, WireError);

const PAGE: usize = 4096;

/// Adds the `netvsc` submodule to `parent`.
pub fn register(parent: &Bound<'_, PyModule>) -> PyResult<()> {
    let module = PyModule::new(parent.py(), "netvsc")?;
    module.add_class::<PyWorker>()?;
    module.add_class::<PyDataPath>()?;
    module.add_function(wrap_pyfunction!(transmit, &module)?)?;
    module.add_function(wrap_pyfunction!(receive, &module)?)?;
    parent.add_submodule(&module)
}

fn wire(error: impl std::fmt::Display) -> PyErr {
    WireError::new_err(error.to_string())
}

/// The RNDIS PACKET message for a frame behind its virtio-net header.
#[pyfunction]
fn transmit<'py>(py: Python<'py>, data: &[u8], checksum: bool) -> PyResult<Bound<'py, PyBytes>> {
    let mut buffer = vec![0; frames::HEADROOM];
    buffer.extend_from_slice(data);
    let start = frames::transmit(&mut buffer, data.len(), None, checksum).map_err(wire)?;
    Ok(PyBytes::new(py, buffer.get(start..).unwrap_or_default()))
}

/// What the interface is given for one PACKET message that is no fragment: virtio-net header and frame.
#[pyfunction]
fn receive<'py>(py: Python<'py>, message: &[u8], mtu: usize) -> PyResult<Bound<'py, PyBytes>> {
    let received = frames::receive(message).map_err(wire)?;
    let frame = received.start..received.start + received.length;
    let mut out = vec![0; frames::VNET_SIZE];
    out.extend_from_slice(message.get(frame).unwrap_or_default());
    frames::finish(&mut out, received.checksum, received.vlan, mtu);
    Ok(PyBytes::new(py, &out))
}

fn duplicate(fd: RawFd) -> PyResult<OwnedFd> {
    if fd < 0 {
        return Err(PyOSError::new_err("bad file descriptor"));
    }
    // SAFETY: the caller keeps `fd` open during this call; a closed one gives EBADF.
    Ok(unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned()?)
}

/// The thread of one virtual processor.
#[pyclass(name = "Worker", module = "vswitch_native.netvsc", frozen)]
pub struct PyWorker {
    inner: Arc<Worker>,
    memory: Arc<GuestMemory>,
}

#[pymethods]
impl PyWorker {
    #[new]
    fn new(
        memory: &PyGuestMemory,
        interrupt_fd: RawFd,
        siefp_gpa: u64,
        sint: u32,
    ) -> PyResult<Self> {
        let memory = memory.shared()?;
        let worker = Worker::start(
            Arc::clone(&memory),
            duplicate(interrupt_fd)?,
            siefp_gpa,
            sint,
        )?;
        Ok(Self {
            inner: Arc::new(worker),
            memory,
        })
    }

    /// Readable while event flags of channels without a data path wait.
    #[getter]
    fn stray_fd(&self) -> RawFd {
        self.inner.strays().fd()
    }

    fn take_strays(&self) -> Vec<u32> {
        self.inner.strays().take()
    }

    fn open(
        &self,
        relid: u32,
        ring_pfns: Vec<u64>,
        downstream_page_offset: usize,
        signal_fd: RawFd,
        link_fd: RawFd,
        packet_socket: bool,
    ) -> PyResult<PyDataPath> {
        let split = ring_pfns.split_at_checked(downstream_page_offset);
        let (upstream, downstream) =
            split.ok_or_else(|| wire("the downstream ring starts behind the pages"))?;
        let ring = |pfns: &[u64]| self.memory.view(pfns, 0, pfns.len() * PAGE);
        let shared = Arc::new(Shared::new(owned_eventfd()?));
        let path = Path::new(
            ring(upstream).map_err(wire)?,
            ring(downstream).map_err(wire)?,
            duplicate(signal_fd)?,
            Link::new(link_fd, packet_socket)?,
            Arc::clone(&shared),
        )
        .map_err(|error: RingError| wire(error))?;
        let key = self.inner.open(relid, path);
        Ok(PyDataPath {
            worker: Arc::clone(&self.inner),
            memory: Arc::clone(&self.memory),
            key,
            shared,
            closed: AtomicBool::new(false),
        })
    }

    /// Ends the thread; every data path on it is closed.
    fn close(&self, py: Python<'_>) {
        py.detach(|| self.inner.end());
    }
}

/// One open channel; see `netvsc/datapath.py` for what each method means.
#[pyclass(name = "DataPath", module = "vswitch_native.netvsc", frozen)]
pub struct PyDataPath {
    worker: Arc<Worker>,
    memory: Arc<GuestMemory>,
    key: u64,
    shared: Arc<Shared>,
    closed: AtomicBool,
}

impl PyDataPath {
    fn act(&self, act: impl FnOnce(&mut Path) + Send + 'static) {
        self.worker.act(self.key, act);
    }

    fn view(&self, pfns: &[u64]) -> Result<BufferView, MemoryError> {
        self.memory.view(pfns, 0, pfns.len() * PAGE)
    }
}

fn kind_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Inband => "inband",
        Kind::Completion => "completion",
        Kind::Rndis => "rndis",
        Kind::Fault => "fault",
    }
}

type ControlTuple<'py> = (&'static str, u64, bool, Bound<'py, PyBytes>);

#[pymethods]
impl PyDataPath {
    #[getter]
    fn control_fd(&self) -> RawFd {
        self.shared.control_fd()
    }

    fn take_control<'py>(&self, py: Python<'py>) -> Vec<ControlTuple<'py>> {
        let give = |item: Control| {
            (
                kind_name(item.kind),
                item.transaction_id,
                item.completion_requested,
                PyBytes::new(py, &item.payload),
            )
        };
        self.shared.take_control().into_iter().map(give).collect()
    }

    fn send_inband(&self, payload: Vec<u8>, transaction_id: u64, completion_requested: bool) {
        self.act(move |path| path.send_inband(&payload, transaction_id, completion_requested));
    }

    fn send_completion(&self, transaction_id: u64, payload: Vec<u8>) {
        self.act(move |path| path.send_completion(transaction_id, &payload));
    }

    fn send_rndis(&self, message: Vec<u8>) {
        self.shared.expect_rndis();
        self.act(move |path| path.send_rndis(message));
    }

    fn set_receive_buffer(
        &self,
        pfns: Vec<u64>,
        set_id: u16,
        slot_size: u64,
        slots: u64,
    ) -> PyResult<()> {
        let view = self.view(&pfns).map_err(wire)?;
        let size = slot_size.saturating_mul(slots);
        self.act(move |path| path.set_receive_buffer(view, set_id, size));
        Ok(())
    }

    fn set_send_buffer(
        &self,
        pfns: Vec<u64>,
        section_size: usize,
        bounce_pfns: Vec<u64>,
    ) -> PyResult<()> {
        if section_size == 0 || pfns.len() * PAGE / section_size < 2 {
            return Err(PyValueError::new_err(format!(
                "send buffer of {} pages: fewer than 2 sections of {section_size} bytes",
                pfns.len()
            )));
        }
        let view = self.view(&pfns).map_err(wire)?;
        let mut bounces = Vec::new();
        for pages in bounce_pfns.chunks_exact(BOUNCE_PAGES) {
            bounces.push((self.view(pages).map_err(wire)?, pages.to_vec()));
        }
        self.act(move |path| path.set_send_buffer(view, section_size, bounces));
        Ok(())
    }

    fn set_aggregation(&self, messages: usize, alignment: usize) {
        self.act(move |path| path.set_aggregation(messages, alignment));
    }

    fn set_offload(&self, checksum: bool, mtu: usize) {
        self.act(move |path| path.set_offload(checksum, mtu));
    }

    fn set_running(&self, running: bool) {
        self.act(move |path| path.set_running(running));
    }

    fn stats(&self) -> HashMap<&'static str, u64> {
        let mut counters: HashMap<&'static str, u64> =
            COUNTERS.into_iter().zip(self.shared.counters()).collect();
        counters.insert("in_flight", self.shared.in_flight());
        counters
    }

    /// Returns when the worker has let go of rings and buffers.
    fn close(&self, py: Python<'_>) {
        if !self.closed.swap(true, Ordering::AcqRel) {
            py.detach(|| self.worker.close(self.key));
        }
    }
}

impl Drop for PyDataPath {
    fn drop(&mut self) {
        if !self.closed.load(Ordering::Acquire) {
            self.worker.close(self.key);
        }
    }
}

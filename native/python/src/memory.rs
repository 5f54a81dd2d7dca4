//! Python surface of the `vswitch-memory` crate.

use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use pyo3::exceptions::PyOSError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use vswitch_memory::{eventfd, BufferView, GuestMemory, Interrupt, MemoryError, Region};

pyo3::import_exception!(vswitch_wire.errors, MemoryAccessError);

/// Adds the `memory` submodule to `parent`.
pub fn register(parent: &Bound<'_, PyModule>) -> PyResult<()> {
    let module = PyModule::new(parent.py(), "memory")?;
    module.add_class::<PyGuestMemory>()?;
    module.add_class::<PyBufferView>()?;
    module.add_class::<PyInterrupt>()?;
    module.add_function(wrap_pyfunction!(signal_fd, &module)?)?;
    module.add_function(wrap_pyfunction!(drain_fd, &module)?)?;
    parent.add_submodule(&module)
}

fn refuse(error: MemoryError) -> PyErr {
    MemoryAccessError::new_err(error.to_string())
}

fn released() -> PyErr {
    MemoryAccessError::new_err("the partition's memory was released")
}

fn unsigned(value: i64, what: &str) -> PyResult<usize> {
    usize::try_from(value)
        .map_err(|_| MemoryAccessError::new_err(format!("{what} {value} is negative")))
}

/// All regions of a partition; `close` lets go of them, and they are unmapped when the last view is gone too.
#[pyclass(name = "GuestMemory", module = "vswitch_native.memory", frozen)]
pub struct PyGuestMemory {
    inner: Mutex<Option<Arc<GuestMemory>>>,
    closed: Arc<AtomicBool>,
}

impl PyGuestMemory {
    /// The memory, for native owners of a data path. Raises MemoryAccessError after `close`.
    pub fn shared(&self) -> PyResult<Arc<GuestMemory>> {
        self.inner
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
            .ok_or_else(released)
    }
}

#[pymethods]
impl PyGuestMemory {
    #[new]
    fn new(regions: Vec<(u64, u64, RawFd)>) -> PyResult<Self> {
        let regions: Vec<Region> = regions
            .into_iter()
            .map(|(gpa, size, fd)| Region { gpa, size, fd })
            .collect();
        let memory = GuestMemory::new(&regions).map_err(refuse)?;
        Ok(Self {
            inner: Mutex::new(Some(Arc::new(memory))),
            closed: Arc::new(AtomicBool::new(false)),
        })
    }

    #[getter]
    fn size(&self) -> u64 {
        self.shared().map_or(0, |memory| memory.size())
    }

    #[getter]
    fn closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    fn read<'py>(&self, py: Python<'py>, gpa: u64, length: i64) -> PyResult<Bound<'py, PyBytes>> {
        let memory = self.shared()?;
        let length = unsigned(length, "length")?;
        memory.check(gpa, length as u64).map_err(refuse)?;
        PyBytes::new_with(py, length, |into| memory.read(gpa, into).map_err(refuse))
    }

    fn write(&self, gpa: u64, data: &[u8]) -> PyResult<()> {
        self.shared()?.write(gpa, data).map_err(refuse)
    }

    fn load_u32(&self, gpa: u64) -> PyResult<u32> {
        self.shared()?.load_u32(gpa).map_err(refuse)
    }

    fn store_u32(&self, gpa: u64, value: u32) -> PyResult<()> {
        self.shared()?.store_u32(gpa, value).map_err(refuse)
    }

    fn view(&self, pfns: Vec<u64>, byte_offset: i64, byte_count: i64) -> PyResult<PyBufferView> {
        let view = self
            .shared()?
            .view(
                &pfns,
                unsigned(byte_offset, "offset")?,
                unsigned(byte_count, "length")?,
            )
            .map_err(refuse)?;
        Ok(PyBufferView {
            inner: view,
            closed: Arc::clone(&self.closed),
        })
    }

    fn set_flag(&self, gpa: u64, bit: u32) -> PyResult<bool> {
        self.shared()?.set_flag(gpa, bit).map_err(refuse)
    }

    fn take_flags<'py>(
        &self,
        py: Python<'py>,
        gpa: u64,
        length: i64,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let memory = self.shared()?;
        let length = unsigned(length, "length")?;
        memory.check(gpa, length as u64).map_err(refuse)?;
        PyBytes::new_with(py, length, |into| {
            memory.take_flags(gpa, into).map_err(refuse)
        })
    }

    fn close(&self) {
        self.closed.store(true, Ordering::Release);
        self.inner
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
    }
}

/// A linear window over scattered pages.
#[pyclass(
    name = "BufferView",
    module = "vswitch_native.memory",
    frozen,
    skip_from_py_object
)]
pub struct PyBufferView {
    inner: BufferView,
    closed: Arc<AtomicBool>,
}

impl PyBufferView {
    /// The window, for native owners of a data path. Raises MemoryAccessError after the memory's `close`.
    pub fn shared(&self) -> PyResult<&BufferView> {
        if self.closed.load(Ordering::Acquire) {
            return Err(released());
        }
        Ok(&self.inner)
    }
}

#[pymethods]
impl PyBufferView {
    fn __len__(&self) -> usize {
        self.inner.len()
    }

    fn read<'py>(
        &self,
        py: Python<'py>,
        offset: i64,
        length: i64,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let view = self.shared()?;
        let (offset, length) = (unsigned(offset, "offset")?, unsigned(length, "length")?);
        if offset > view.len() || length > view.len() - offset {
            return Err(refuse(MemoryError::OutsideView {
                offset,
                length,
                size: view.len(),
            }));
        }
        PyBytes::new_with(py, length, |into| view.read(offset, into).map_err(refuse))
    }

    fn write(&self, offset: i64, data: &[u8]) -> PyResult<()> {
        self.shared()?
            .write(unsigned(offset, "offset")?, data)
            .map_err(refuse)
    }

    fn load_u32(&self, offset: i64) -> PyResult<u32> {
        self.shared()?
            .load_u32(unsigned(offset, "offset")?)
            .map_err(refuse)
    }

    fn store_u32(&self, offset: i64, value: u32) -> PyResult<()> {
        self.shared()?
            .store_u32(unsigned(offset, "offset")?, value)
            .map_err(refuse)
    }

    fn slice(&self, offset: i64, length: i64) -> PyResult<PyBufferView> {
        let part = self
            .shared()?
            .slice(unsigned(offset, "offset")?, unsigned(length, "length")?)
            .map_err(refuse)?;
        Ok(PyBufferView {
            inner: part,
            closed: Arc::clone(&self.closed),
        })
    }
}

/// Host to guest: an event flag on the channel's VP, then the VP's interrupt eventfd.
#[pyclass(name = "Interrupt", module = "vswitch_native.memory", frozen)]
pub struct PyInterrupt {
    inner: Mutex<Option<Arc<Interrupt>>>,
}

impl PyInterrupt {
    /// The interrupt, for native owners of a data path. Raises MemoryAccessError after `close`.
    pub fn shared(&self) -> PyResult<Arc<Interrupt>> {
        self.inner
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
            .ok_or_else(|| MemoryAccessError::new_err("the interrupt was closed"))
    }
}

#[pymethods]
impl PyInterrupt {
    #[new]
    fn new(memory: &Bound<'_, PyGuestMemory>, fd: RawFd) -> PyResult<Self> {
        let interrupt = Interrupt::new(memory.get().shared()?, fd)
            .map_err(|error| PyOSError::new_err(error.to_string()))?;
        Ok(Self {
            inner: Mutex::new(Some(Arc::new(interrupt))),
        })
    }

    #[pyo3(signature = (siefp_gpa, sint, flag, fd = None))]
    fn target(
        &self,
        siefp_gpa: Option<u64>,
        sint: u32,
        flag: u32,
        fd: Option<RawFd>,
    ) -> PyResult<()> {
        self.shared()?
            .target(siefp_gpa, sint, flag, fd)
            .map_err(refuse)
    }

    fn signal(&self) {
        if let Ok(interrupt) = self.shared() {
            interrupt.signal();
        }
    }

    fn close(&self) {
        self.inner
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
    }
}

/// Adds 1 to the eventfd `fd`, which no hostile peer shares; never blocks.
#[pyfunction]
fn signal_fd(fd: RawFd) {
    eventfd::signal(fd);
}

/// Reads and clears the eventfd `fd`; 0 when it was clear. Never blocks.
#[pyfunction]
fn drain_fd(fd: RawFd) -> u64 {
    eventfd::drain(fd)
}

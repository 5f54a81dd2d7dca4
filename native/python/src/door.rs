//! Python surface of the `vswitch-door` crate.

use std::os::fd::{BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::sync::{Mutex, PoisonError};

use pyo3::exceptions::{PyOSError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList};
use vswitch_door as door;

/// Adds the `door` submodule to `parent`.
pub fn register(parent: &Bound<'_, PyModule>) -> PyResult<()> {
    let module = PyModule::new(parent.py(), "door")?;
    module.add_class::<Doors>()?;
    parent.add_submodule(&module)
}

fn duplicate(fd: RawFd) -> PyResult<OwnedFd> {
    if fd < 0 {
        return Err(PyValueError::new_err(format!(
            "file descriptor {fd} is negative"
        )));
    }
    // SAFETY: the caller's fd is open for the duration of the call; a closed one gives EBADF.
    unsafe { BorrowedFd::borrow_raw(fd) }
        .try_clone_to_owned()
        .map_err(|error| PyOSError::new_err(error.to_string()))
}

/// The door thread; after `stop` every call is without effect.
#[pyclass(module = "vswitch_native.door", frozen)]
struct Doors {
    inner: Mutex<Option<door::Doors>>,
}

impl Doors {
    fn with<T>(&self, act: impl FnOnce(&door::Doors) -> T) -> Option<T> {
        self.inner
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .as_ref()
            .map(act)
    }
}

#[pymethods]
impl Doors {
    #[new]
    fn new() -> PyResult<Self> {
        let inner = door::Doors::new().map_err(|error| PyOSError::new_err(error.to_string()))?;
        Ok(Self {
            inner: Mutex::new(Some(inner)),
        })
    }

    /// `fd` is taken over.
    #[pyo3(signature = (fd, *, frames_per_turn, frames_per_second, frames_burst, send_backlog, send_limit))]
    fn open(
        &self,
        fd: RawFd,
        frames_per_turn: usize,
        frames_per_second: u32,
        frames_burst: u32,
        send_backlog: usize,
        send_limit: usize,
    ) -> PyResult<u64> {
        if fd < 0 {
            return Err(PyValueError::new_err(format!(
                "file descriptor {fd} is negative"
            )));
        }
        let quotas = door::Quotas {
            frames_per_turn,
            frames_per_second,
            frames_burst,
            send_backlog,
            send_limit,
        };
        // SAFETY: the caller hands its descriptor over.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        self.with(|doors| doors.open(socket, quotas))
            .ok_or_else(|| PyOSError::new_err("the door thread was stopped"))
    }

    /// `fds` are duplicated.
    fn send(&self, door: u64, frame: &[u8], fds: Vec<RawFd>) -> PyResult<()> {
        let fds = fds
            .into_iter()
            .map(duplicate)
            .collect::<PyResult<Vec<_>>>()?;
        self.with(|doors| doors.send(door, frame.to_vec(), fds));
        Ok(())
    }

    fn expect_fds(&self, door: u64, count: usize) {
        self.with(|doors| doors.expect_fds(door, count));
    }

    fn hold(&self, door: u64, held: bool) {
        self.with(|doors| doors.hold(door, held));
    }

    fn consumed(&self, door: u64, count: usize) {
        self.with(|doors| doors.consumed(door, count));
    }

    fn close(&self, door: u64, reason: String, code: Option<u32>) {
        self.with(|doors| doors.close(door, reason, code));
    }

    #[getter]
    fn event_fd(&self) -> RawFd {
        self.with(door::Doors::event_fd).unwrap_or(-1)
    }

    /// (door, frame, descriptors) for a frame, (door, None, reason) for the end of a door.
    fn take<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        let events = PyList::empty(py);
        for event in self.with(door::Doors::take).unwrap_or_default() {
            match event {
                door::Event::Frame { door, data, fds } => {
                    let fds: Vec<RawFd> = fds.into_iter().map(IntoRawFd::into_raw_fd).collect();
                    events.append((door, PyBytes::new(py, &data), fds))?;
                }
                door::Event::Closed { door, reason } => events.append((door, py.None(), reason))?,
            }
        }
        Ok(events)
    }

    /// Closes all doors without a word and ends the thread.
    fn stop(&self, py: Python<'_>) {
        let doors = self
            .inner
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        py.detach(|| drop(doors));
    }
}

//! Python surface of the `vswitch-ring` crate.

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList};
use vswitch_ring as ring;

use crate::memory::PyBufferView;

pyo3::import_exception!(vswitch_wire.errors, RingError);
pyo3::import_exception!(vswitch_wire.errors, WireError);

/// Adds the `ring` submodule to `parent`.
pub fn register(parent: &Bound<'_, PyModule>) -> PyResult<()> {
    let module = PyModule::new(parent.py(), "ring")?;
    module.add_class::<RingReader>()?;
    module.add_class::<RingWriter>()?;
    parent.add_submodule(&module)
}

/// What the peer did wrong is a RingError; what the caller did wrong is a WireError.
fn refuse(error: ring::RingError) -> PyErr {
    match error {
        ring::RingError::Geometry { .. } | ring::RingError::NeverFits { .. } => {
            WireError::new_err(error.to_string())
        }
        _ => RingError::new_err(error.to_string()),
    }
}

/// The consuming side.
#[pyclass(module = "vswitch_native.ring")]
struct RingReader {
    inner: ring::RingReader,
    scratch: Vec<u8>,
}

#[pymethods]
impl RingReader {
    #[new]
    fn new(view: &Bound<'_, PyBufferView>) -> PyResult<Self> {
        let inner = ring::RingReader::new(view.get().shared()?.clone()).map_err(refuse)?;
        Ok(Self {
            inner,
            scratch: Vec::new(),
        })
    }

    #[getter]
    fn size(&self) -> u32 {
        self.inner.size()
    }

    fn pending(&mut self) -> PyResult<bool> {
        self.inner.pending().map_err(refuse)
    }

    #[pyo3(signature = (limit = 64))]
    fn read<'py>(&mut self, py: Python<'py>, limit: usize) -> PyResult<Bound<'py, PyList>> {
        let packets = PyList::empty(py);
        while packets.len() < limit {
            match self.inner.next(&mut self.scratch) {
                Ok(Some(_)) => packets.append(PyBytes::new(py, &self.scratch))?,
                Ok(None) => break,
                // What came before is good; the next call finds the same lie.
                Err(_) if !packets.is_empty() => break,
                Err(error) => return Err(refuse(error)),
            }
        }
        Ok(packets)
    }

    fn commit(&mut self) -> PyResult<bool> {
        self.inner.commit().map_err(refuse)
    }

    fn mask(&self) {
        self.inner.mask();
    }

    fn unmask(&mut self) -> PyResult<bool> {
        self.inner.unmask().map_err(refuse)
    }
}

/// The producing side.
#[pyclass(module = "vswitch_native.ring")]
struct RingWriter {
    inner: ring::RingWriter,
}

#[pymethods]
impl RingWriter {
    #[new]
    fn new(view: &Bound<'_, PyBufferView>) -> PyResult<Self> {
        let inner = ring::RingWriter::new(view.get().shared()?.clone()).map_err(refuse)?;
        Ok(Self { inner })
    }

    #[getter]
    fn size(&self) -> u32 {
        self.inner.size()
    }

    #[getter]
    fn free(&mut self) -> PyResult<u32> {
        self.inner.free().map_err(refuse)
    }

    #[getter]
    fn capacity(&self) -> usize {
        self.inner.capacity()
    }

    fn write(&mut self, packet: &[u8]) -> PyResult<bool> {
        self.inner.write(packet).map_err(|error| match error {
            ring::RingError::Malformed(error) => WireError::new_err(error.to_string()),
            other => refuse(other),
        })
    }

    fn commit(&mut self) -> PyResult<bool> {
        self.inner.commit().map_err(refuse)
    }
}

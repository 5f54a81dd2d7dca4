//! Python surface of the `vswitch-switch` crate.

use std::sync::{Mutex, PoisonError};

use pyo3::prelude::*;
use vswitch_switch::endpoint::Endpoint;

/// A native endpoint on its way to a datapath; whoever attaches it takes it out.
#[pyclass(module = "vswitch_native.switch", frozen)]
pub struct EndpointHandle {
    endpoint: Mutex<Option<Box<dyn Endpoint>>>,
}

impl EndpointHandle {
    /// Wraps an endpoint for `Datapath.attach`.
    pub fn new(endpoint: Box<dyn Endpoint>) -> Self {
        EndpointHandle {
            endpoint: Mutex::new(Some(endpoint)),
        }
    }

    /// Takes the endpoint; `None` if it was attached before.
    pub fn take(&self) -> Option<Box<dyn Endpoint>> {
        self.endpoint
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
    }
}

#[pymethods]
impl EndpointHandle {
    /// False once a datapath has taken the endpoint.
    #[getter]
    fn available(&self) -> bool {
        self.endpoint
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .is_some()
    }
}

/// Adds the `switch` submodule to `parent`.
pub fn register(parent: &Bound<'_, PyModule>) -> PyResult<()> {
    let module = PyModule::new(parent.py(), "switch")?;
    module.add_class::<EndpointHandle>()?;
    parent.add_submodule(&module)
}

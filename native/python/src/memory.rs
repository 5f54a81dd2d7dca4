//! Python surface of the `vswitch-memory` crate.

use pyo3::prelude::*;

/// Adds the `memory` submodule to `parent`.
pub fn register(parent: &Bound<'_, PyModule>) -> PyResult<()> {
    let module = PyModule::new(parent.py(), "memory")?;
    parent.add_submodule(&module)
}

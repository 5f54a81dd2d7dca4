//! Python surface of the `vswitch-door` crate.

use pyo3::prelude::*;

/// Adds the `door` submodule to `parent`.
pub fn register(parent: &Bound<'_, PyModule>) -> PyResult<()> {
    let module = PyModule::new(parent.py(), "door")?;
    parent.add_submodule(&module)
}

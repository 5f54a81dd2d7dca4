//! Python surface of the `vswitch-switch` crate.

use pyo3::prelude::*;

/// Adds the `switch` submodule to `parent`.
pub fn register(parent: &Bound<'_, PyModule>) -> PyResult<()> {
    let module = PyModule::new(parent.py(), "switch")?;
    parent.add_submodule(&module)
}

//! Python surface of the `vswitch-netvsc` crate.

use pyo3::prelude::*;

/// Adds the `netvsc` submodule to `parent`.
pub fn register(parent: &Bound<'_, PyModule>) -> PyResult<()> {
    let module = PyModule::new(parent.py(), "netvsc")?;
    parent.add_submodule(&module)
}

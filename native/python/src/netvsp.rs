//! Python surface of the `vswitch-netvsp` crate.

use pyo3::prelude::*;

/// Adds the `netvsp` submodule to `parent`.
pub fn register(parent: &Bound<'_, PyModule>) -> PyResult<()> {
    let module = PyModule::new(parent.py(), "netvsp")?;
    parent.add_submodule(&module)
}

//! Python surface of the `vswitch-ring` crate.

use pyo3::prelude::*;

/// Adds the `ring` submodule to `parent`.
pub fn register(parent: &Bound<'_, PyModule>) -> PyResult<()> {
    let module = PyModule::new(parent.py(), "ring")?;
    parent.add_submodule(&module)
}

//! Python surface of the `vswitch-wire` crate.

use pyo3::prelude::*;

/// Adds the `wire` submodule to `parent`.
pub fn register(parent: &Bound<'_, PyModule>) -> PyResult<()> {
    let module = PyModule::new(parent.py(), "wire")?;
    parent.add_submodule(&module)
}

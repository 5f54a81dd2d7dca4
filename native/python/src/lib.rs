//! The extension module `vswitch_native._native`: the one door between Python and Rust.

use pyo3::prelude::*;

mod door;
mod memory;
mod netvsc;
mod netvsp;
mod ring;
mod switch;
mod wire;

#[pymodule]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    wire::register(module)?;
    memory::register(module)?;
    ring::register(module)?;
    door::register(module)?;
    switch::register(module)?;
    netvsp::register(module)?;
    netvsc::register(module)?;
    Ok(())
}

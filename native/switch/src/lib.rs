//! The native switch engine: endpoints, workers, pipeline, flow cache, capture, trace.

pub mod drops;
pub mod endpoint;
mod segment;

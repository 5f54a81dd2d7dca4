//! The native switch engine: endpoints, workers, pipeline, flow cache, capture, trace.

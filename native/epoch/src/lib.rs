//! The one epoch mechanism: what returns memory waits until every worker has passed a quiescent point.

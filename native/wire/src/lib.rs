//! The byte formats that both sides of a partition's door share: VMBus, NVSP, RNDIS, hypercalls, door frames.

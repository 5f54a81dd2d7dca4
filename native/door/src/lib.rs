//! The door thread: owns every partition's door socket and hands validated events to the daemon.

"""The vswitch API, version 1: generated from `proto/` by `make proto`; do not edit."""

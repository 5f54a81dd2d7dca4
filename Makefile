# Two commands for a newcomer: `make demo` and `make test`. Everything else is for those who change vswitch.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
CARGO  ?= cargo

.PHONY: native

# The extension module, built in place for work in this checkout.
native:
	cd native && $(CARGO) build --release -p vswitch-native --features extension-module
	cp native/target/release/lib_native.so vswitch_native/_native.abi3.so

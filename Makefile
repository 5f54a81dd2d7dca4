# Two commands for a newcomer: `make demo` and `make test`. Everything else is for those who change vswitch.

# The first Python >= 3.11 that can make a virtual environment; `make PYTHON=... ` overrides.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 /usr/bin/python3; do \
	$$p -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV   ?= .venv
BIN    := $(VENV)/bin
CARGO  ?= cargo
CARGO_OUT := $(or $(CARGO_TARGET_DIR),native/target)
PYTEST_ARGS ?=
# More workers than processors: tests also wait.
TEST_JOBS ?= $(shell expr $$(nproc) + 1)
# `make guests SUITE=all` runs every test there is for them; `make guests KERNEL=bzImage MODULES=lib/modules/RELEASE [INITRD=F]` boots yours.
SUITE ?= short
GUESTS_ARGS ?=
FUZZ_SECONDS ?= 60

PACKAGES := hypervisor netvsc netvsp vswitch vswitch_confine vswitch_native vswitch_wire vswitchctl vswitchd vswitchlab
RUST_SOURCES := $(shell find native -path native/target -prune -o -path native/fuzz -prune -o \( -name '*.rs' -o -name 'Cargo.*' \) -print)

.PHONY: demo test guests guests-machine hostile native wheel lint lint-python lint-rust test-rust fuzz proto proto-check proto-baseline clean

# --- for everyone ---------------------------------------------------------------------------------------------

demo: $(VENV)/.installed          ## builds, then tells the whole story in under a minute
	@$(BIN)/vswitch demo

# First the tests that share the processors, then those that must have the machine to themselves (5: none was chosen), then
# stock kernels as guests, where there is KVM or QEMU; elsewhere it is said why not.
test: export PYTHONDONTWRITEBYTECODE :=
test: $(VENV)/.installed-dev      ## every test
	$(BIN)/python -m pytest -m "not alone" -n $(TEST_JOBS) --dist worksteal --junitxml=build/tests.xml $(PYTEST_ARGS) || [ $$? -eq 5 ]
	$(BIN)/python -m pytest -m alone --junitxml=build/tests-alone.xml $(PYTEST_ARGS) || [ $$? -eq 5 ]
	$(BIN)/python -m tests.guests.run --or-skip

guests: $(VENV)/.installed-dev    ## stock Debian kernels (or KERNEL=, MODULES=, INITRD=) boot as guests and work
	$(BIN)/python -m tests.guests.run --suite $(SUITE) $(if $(KERNEL),--own-kernel $(KERNEL)) $(if $(MODULES),--own-modules $(MODULES)) \
		$(if $(INITRD),--own-initrd $(INITRD)) $(GUESTS_ARGS)

hostile: $(VENV)/.installed-dev   ## a guest that does harm at random for 120 s, others watched (HOSTILE_ARGS="--seconds 30 --seed 7")
	$(BIN)/python -m tests.guests.hostile $(HOSTILE_ARGS)

guests-machine:                   ## as root: what emulates a machine where KVM cannot run such guests (Debian)
	apt-get update -q && apt-get install -qy --no-install-recommends qemu-system-x86 debian-archive-keyring

wheel: $(VENV)/.installed-dev     ## dist/vswitch-*.whl, which installs where there is no cargo
	rm -rf dist
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	@ls dist/*.whl

# --- environments ---------------------------------------------------------------------------------------------
# Without cargo (or a crate registry) the installation succeeds without the native module and vswitch says so.

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "vswitch needs Python 3.11 or newer with the venv module; install it (Debian: apt install python3-venv) or give make PYTHON=..."; exit 1; }
	@echo "making $(VENV) with $(PYTHON)"
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml $(RUST_SOURCES)
	@echo "installing vswitch into $(VENV) (the native module takes about a minute where there is cargo)"
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/bin/python pyproject.toml $(RUST_SOURCES)
	@echo "installing vswitch and its development tools into $(VENV)"
	$(BIN)/python -m pip install --quiet --editable '.[test,dev]'
	@touch $@ $(VENV)/.installed

# --- for those who change it ------------------------------------------------------------------------------------

native:                           ## extension module and VMM, built in place for work in this checkout
	cd native && $(CARGO) build --release -p vswitch-native --features extension-module
	cd native && $(CARGO) build --release -p vswitch-vmm
	cp $(CARGO_OUT)/release/lib_native.so vswitch_native/_native.abi3.so
	install -m 755 $(CARGO_OUT)/release/vswitch-vmm vswitch_native/vswitch-vmm

lint: lint-python lint-rust

lint-python: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(PACKAGES)
	$(BIN)/lint-imports
	$(BIN)/deptry .
	$(BIN)/python tools/specification.py --names

# The first clippy also finds dependencies that a crate names and does not use (tests use only some of them).
lint-rust:
	cd native && $(CARGO) fmt --all --check
	cd native && $(CARGO) clippy --workspace --lib -- -D warnings -D unused_crate_dependencies
	cd native && $(CARGO) clippy --workspace --all-targets -- -D warnings

# The loom runs try every interleaving of the epoch and ring protocols' atomic steps.
test-rust:
	cd native && $(CARGO) test --workspace --exclude vswitch-native
	cd native && RUSTFLAGS='--cfg loom' $(CARGO) test -p vswitch-epoch -p vswitch-ring --test loom --target-dir target/loom

proto: $(VENV)/.installed-dev     ## vswitch_api/ anew from proto/
	$(BIN)/python proto/generate.py

# Breaking changes are judged against a committed image of the API, so that a fresh clone needs no history.
proto-check: $(VENV)/.installed-dev
	$(BIN)/buf lint
	$(BIN)/buf breaking --against proto/vswitch.v1.binpb
	$(BIN)/python proto/generate.py --check

proto-baseline: proto-check       ## after an addition: what later changes must stay compatible with
	$(BIN)/buf build --exclude-source-info -o proto/vswitch.v1.binpb

# The Python targets follow: the stateful one for as long, the parsers a quarter of it each.
fuzz: $(VENV)/.installed-dev      ## FUZZ_SECONDS for each target
	native/fuzz/run.sh $(FUZZ_SECONDS)
	$(BIN)/python tests/fuzz/run.py $(FUZZ_SECONDS)

clean:
	rm -rf $(VENV) build dist native/target native/fuzz/target vswitch_native/*.so *.egg-info

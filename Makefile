# The commands of daily work. Each installs what it needs; `make setup` alone does only that.
CARGO ?= cargo
PYTHON ?= python3
VENV := target/venv
# The program that the black-box tests start; built with the profile of the other tests, so nothing compiles twice.
PROGRAM ?= target/debug/edgehub
# Seconds per fuzz target.
FUZZ_SECS ?= 60
# Idle connections of `make compare`; needs a limit of open files (ulimit -n) above it.
IDLE ?= 10000
# Durability of the hub's store in `make compare`; the peer has none.
DURABILITY ?= sync
# Kills and losses of power per test of `make soak`, cases of the queues' model, and seconds with a full store.
KILLS ?= 100
MODEL_CASES ?= 2000
FULL_SECS ?= 180
# Messages on one AMQP link in the long form; messages that wait for the upstream; how long that asks for a pause.
AMQP_MESSAGES ?= 100000
BACKLOG ?= 1000000
THROTTLED_SECS ?= 180

.PHONY: help demo test test-rust test-blackbox soak bench load compare fuzz setup setup-tests lint deny doc

help:
	@echo "make demo    build the program and show it at work"
	@echo "make test    all tests: unit, property, vector, crash, power loss, and black-box with public SDKs"
	@echo "make soak    the long forms: KILLS=$(KILLS), MODEL_CASES=$(MODEL_CASES), FULL_SECS=$(FULL_SECS), BACKLOG=$(BACKLOG)"
	@echo "make bench   criterion benchmarks, then the load generator against the built program"
	@echo "make compare the load generator in turns with Mosquitto and RabbitMQ, IDLE=$(IDLE) idle connections included"
	@echo "make fuzz    every fuzz target for FUZZ_SECS=$(FUZZ_SECS) seconds (installs cargo-fuzz)"
	@echo "make lint    format check and clippy      make doc   documentation, warnings are errors"
	@echo "make deny    licences and advisories of all dependencies (installs cargo-deny)"
	@echo "make setup   only install what is missing and build RocksDB once"

setup:
	@scripts/setup

setup-tests:
	@scripts/setup tests

demo: setup
	$(CARGO) build --release -p edgehub
	target/release/edgehub demo

test: test-rust test-blackbox

# Building everything first gives the black-box tests their program with the very features of the other tests.
test-rust: setup
	$(CARGO) build --workspace --bins --tests
	$(CARGO) test --workspace

test-blackbox: setup-tests $(VENV)/requirements
	$(CARGO) build --workspace --bins --tests
	EDGEHUB_PROGRAM=$(abspath $(PROGRAM)) $(VENV)/bin/python -m pytest tests

# A failure prints its seed; EDGEHUB_STORAGE_SEED=seed repeats the work, and the moments of the kills nearly.
soak: setup-tests $(VENV)/requirements
	EDGEHUB_STORAGE_KILLS=$(KILLS) $(CARGO) test -p edgehub-storage --test crash --test power -- --nocapture
	EDGEHUB_MODEL_CASES=$(MODEL_CASES) $(CARGO) test -p edgehub-storage --test model -- --nocapture
	$(CARGO) build --workspace --bins
	EDGEHUB_TEST_FULL_SECS=$(FULL_SECS) EDGEHUB_PROGRAM=$(abspath $(PROGRAM)) $(VENV)/bin/python -m pytest tests/test_store_full.py
	EDGEHUB_TEST_AMQP_MESSAGES=$(AMQP_MESSAGES) EDGEHUB_PROGRAM=$(abspath $(PROGRAM)) $(VENV)/bin/python -m pytest tests/test_amqp_raw.py
	EDGEHUB_TEST_BACKLOG=$(BACKLOG) EDGEHUB_TEST_THROTTLED_SECS=$(THROTTLED_SECS) EDGEHUB_PROGRAM=$(abspath $(PROGRAM)) \
		$(VENV)/bin/python -m pytest tests/test_upstream_backlog.py tests/test_upstream_faults.py tests/test_upstream_clock.py

# The stamp is written last: an interrupted installation is repeated.
$(VENV)/requirements: tests/requirements.txt | setup
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --requirement tests/requirements.txt
	cp tests/requirements.txt $@

bench: setup
	$(CARGO) bench -p edgehub-benches
	$(MAKE) load

# LOAD chooses the scenario, for example: make load LOAD="--scenario pairs --pairs 50"
load: setup
	$(CARGO) build --release -p edgehub -p edgehub-benches
	target/release/load --spawn target/release/edgehub $(LOAD)

COMPARE = target/release/load --spawn target/release/edgehub --peer mosquitto --durability $(DURABILITY)
COMPARE_AMQP = target/release/load --spawn target/release/edgehub --peer rabbitmq --protocol amqp --window 256 --durability $(DURABILITY)
compare: setup
	@scripts/setup peers
	$(CARGO) build --release -p edgehub -p edgehub-benches
	$(COMPARE) --scenario fan-in --devices 10 --messages 400000
	$(COMPARE) --scenario pairs --devices 50 --messages 400000
	$(COMPARE) --scenario fan-in --devices 1000 --window 1 --messages 200000
	$(COMPARE_AMQP) --scenario fan-in --devices 1 --messages 200000
	$(COMPARE_AMQP) --scenario fan-in --devices 10 --messages 200000
	$(COMPARE_AMQP) --scenario fan-in --devices 10 --per-connection 10 --messages 200000
	$(COMPARE_AMQP) --scenario pairs --devices 50 --messages 200000
	$(COMPARE) --scenario idle --devices $(IDLE) --rounds 1
	$(COMPARE) --scenario idle --devices $(IDLE) --rounds 1 --tls

fuzz: setup
	FUZZ_SECS=$(FUZZ_SECS) scripts/fuzz

lint: setup
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings

doc: setup
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --workspace --no-deps

deny:
	@command -v cargo-deny >/dev/null || $(CARGO) install --locked cargo-deny
	$(CARGO) deny check

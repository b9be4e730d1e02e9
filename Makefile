# SPDX-License-Identifier: Apache-2.0
# `make help` lists the targets. All but install and clean begin with `make setup`, which is quick when nothing is to be done.

SHELL := /bin/bash
PYTHON := .venv/bin/python
CARGO := cargo --quiet
export VMBUS_RUN_BEGUN := $(shell date +%s.%N)
export PATH := $(CURDIR)/.venv/bin:$(PATH):$(HOME)/.cargo/bin

.PHONY: help setup run test test-fast soak bench fuzz lint install clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | sort | expand -t 12

setup: ## packages, users, .venv, the core in release mode, programs in .venv/bin
	@test -x /usr/bin/python3 || { apt-get update -q && apt-get install -y -q --no-install-recommends python3; }
	@/usr/bin/python3 setup/ready.py

run: setup ## the main job: an ordinary user's Debian machine on a private bus, shown step by step
	@$(PYTHON) -m setup.run

# The random tests begin at a seed of their own choice and print it; here at a fixed one, so that what fails after a
# change fails because of it. Soak and fuzz draw new ones.
test test-fast: export VMBUS_SEED ?= 1
test test-fast: export FUZZ_SEED ?= 1
fuzz: export FUZZ_SECONDS ?= $(if $(MINUTES),$(shell expr $(MINUTES) '*' 60),60)

test: setup ## everything but the long rounds (under 40 minutes on 2 cores)
	@$(PYTHON) -m pytest

test-fast: setup ## what needs no nested host, without the tests marked long (under 5 minutes)
	@$(PYTHON) -m pytest --no-nested -m "not long"

soak: setup ## the long rounds
	@$(PYTHON) -m pytest --soak -m soak

fuzz: setup ## random input to every parser, MINUTES each (default 1)
	@$(PYTHON) -m pytest --fuzz -m fuzz

bench: setup ## side-by-side runs against qemu and libvirt; one line of JSON each
	@$(PYTHON) -m bench

lint: setup ## ruff, mypy, rustfmt, clippy
	ruff check .
	ruff format --check .
	mypy
	cd native && $(CARGO) fmt --all --check
	cd native && $(CARGO) clippy --workspace --all-targets -- -D warnings
	cd native/fuzz && $(CARGO) fmt --check
	cd native/fuzz && $(CARGO) clippy --release -- -D warnings

clean: ## what setup and the tests made in the checkout (not packages, not users)
	rm -rf .venv .cache vmbus/_native native/target native/fuzz/target .pytest_cache .mypy_cache .ruff_cache

-include install.mk

# SPDX-License-Identifier: Apache-2.0
"""Long rounds of the image crate's own tests; the short ones run with the other crates' (test_lint.py)."""

from __future__ import annotations

import os

import pytest

from tests.lab.ahead import cargo, quiet

FUZZ_SECONDS = int(os.environ.get("FUZZ_SECONDS", "60"))


def crate_tests(*words: str, **environment: str) -> None:
    """A part of the crate's tests with their lengths from the environment."""
    lengths = [f"{name}={value}" for name, value in environment.items()]
    quiet(["env", *lengths, *cargo("test", "--quiet", "-p", "vmbus-qcow2", *words)])


@pytest.mark.fuzz
@pytest.mark.timeout(10 * FUZZ_SECONDS + 900)
def test_damaged_images_for_a_while() -> None:
    # About ten damaged images a second in a debug build.
    crate_tests("--test", "mutated", VMBUS_MUTATIONS=str(10 * FUZZ_SECONDS))


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_ten_thousand_power_cuts() -> None:
    crate_tests("--lib", "powercut", VMBUS_CUTS="2500")


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_long_sequences_beside_qemu() -> None:
    crate_tests("--test", "differential", VMBUS_ROUNDS="10")

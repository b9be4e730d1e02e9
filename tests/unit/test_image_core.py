# SPDX-License-Identifier: Apache-2.0
"""The Rust tests of the image crate: engines, formats, power cuts, injected errors, damaged images, and
long sequences beside qemu-io."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

NATIVE = Path(__file__).parents[2] / "native"
FUZZ_SECONDS = int(os.environ.get("FUZZ_SECONDS", "60"))


def cargo_test(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["cargo", "test", "--quiet", "-p", "vmbus-qcow2", *words]
    return subprocess.run(
        command, cwd=NATIVE, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


needs_cargo = pytest.mark.skipif(shutil.which("cargo") is None, reason="cargo (rustup, or package cargo)")


@needs_cargo
def test_the_crates_own_tests_pass() -> None:
    done = cargo_test(VMBUS_CUTS="150", VMBUS_MUTATIONS="100")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


@needs_cargo
@pytest.mark.fuzz
def test_damaged_images_for_a_while() -> None:
    # About ten damaged images a second in a debug build.
    done = cargo_test("--test", "mutated", VMBUS_MUTATIONS=str(10 * FUZZ_SECONDS))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


@needs_cargo
@pytest.mark.soak
def test_ten_thousand_power_cuts() -> None:
    done = cargo_test("--lib", "powercut", VMBUS_CUTS="2500")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


@needs_cargo
@pytest.mark.soak
def test_long_sequences_beside_qemu() -> None:
    done = cargo_test("--test", "differential", VMBUS_ROUNDS="10")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]

# SPDX-License-Identifier: Apache-2.0
"""Random guests against whole virtio devices, FUZZ_SECONDS long (native/vmm/src/virtio/fuzz)."""

from __future__ import annotations

import os

import pytest

from tests.lab.ahead import cargo, quiet

SECONDS = int(os.environ.get("FUZZ_SECONDS", "60"))


@pytest.mark.fuzz
@pytest.mark.timeout(SECONDS + 900)
def test_random_guests_harm_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUZZ_SECONDS", str(SECONDS))
    quiet(cargo("test", "--quiet", "-p", "vmbus-vmm", "--lib", "virtio::fuzz"))

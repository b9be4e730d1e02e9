# SPDX-License-Identifier: Apache-2.0
"""The nested host is the real host that the tests in it take it for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.lab import capabilities

pytestmark = pytest.mark.nested


@pytest.mark.parametrize("name", sorted(capabilities.NESTED))
def test_it_has_what_tests_are_sent_there_for(name: str) -> None:
    assert capabilities.absent(name) == ""


def test_it_runs_debians_stock_kernel() -> None:
    assert "+deb12-amd64" in os.uname().release


def test_kvm_has_nested_paging() -> None:
    assert Path("/sys/module/kvm_amd/parameters/npt").read_text() == "Y\n"

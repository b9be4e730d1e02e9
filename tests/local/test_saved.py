# SPDX-License-Identifier: Apache-2.0
"""Machines that earlier versions saved go on in this one, whatever became of the code."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.abi.saved import BEAT, PLACE, empty_disk, machine
from vmbus.wire.worker import Restore, Resume

pytestmark = pytest.mark.requires("kvm")

KEPT = sorted(PLACE.glob("*.saved"))


def test_each_version_s_file_is_kept() -> None:
    assert [path.name for path in KEPT if "vmbus-1" in path.name and path.name.endswith("-1.saved")]


@pytest.mark.parametrize("kept", KEPT, ids=lambda path: path.stem)
def test_a_kept_machine_goes_on(kept: Path, tmp_path: Path) -> None:
    told = json.loads(kept.with_suffix(".json").read_text())
    # The file notes that a machine has gone on from it.
    copy = shutil.copyfile(kept, tmp_path / "saved")
    file = os.open(copy, os.O_RDWR)
    try:
        machine_type = kept.stem.partition(f"-{told['cpu-model']}")[0]
        with machine(told["cpu-model"], empty_disk(tmp_path), machine_type, restore=file) as guest:
            if guest.configured.error == "NotSupported":
                pytest.skip(f"needs kvm: one that runs the model ({guest.configured.message})")
            assert guest.configured.error is None, guest.configured
            result = guest.service.do(Restore, changed_disks=True)
            assert result.error is None, result
            assert guest.service.do(Resume).error is None
            printed = guest.said(b"\n", 60)
            while not BEAT.search(printed):
                printed += guest.said(b"\n", 60)
    finally:
        os.close(file)
    # The same guest, which has written a little more since and did not begin anew.
    assert b"begins" not in printed
    assert int(BEAT.findall(printed)[0]) > told["beat"]

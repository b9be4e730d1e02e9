# SPDX-License-Identifier: Apache-2.0
"""The interfaces' XML: read strictly, and carried out completely."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from vmbus.wire import contract
from vmbus.wire.contract import ContractError

OWN = '<annotation name="org.vmbus1.Access.Own" value="org.vmbus1.machine.start"/>'


def changed(tmp_path: Path, file: str, old: str, new: str) -> Path:
    for source in contract.directory().glob("org.vmbus1.*.xml"):
        shutil.copy(source, tmp_path)
    text = (tmp_path / file).read_text()
    assert old in text
    (tmp_path / file).write_text(text.replace(old, new, 1))
    return tmp_path


def test_every_method_has_a_rule_or_says_why_not() -> None:
    for interface in contract.load().values():
        for method in interface.methods.values():
            rules = [method.own, *([method.other] if method.other else [])]
            assert all(rule.action or rule.reason for rule in rules), method.name
            assert (method.other is not None) == (interface.name in contract.OWNED)


def test_actions_of_ones_own_and_of_others_differ() -> None:
    for interface in contract.load().values():
        for method in interface.methods.values():
            if method.other is not None:
                assert method.other.action != method.own.action, method.name


def test_a_method_without_its_rule_is_refused(tmp_path: Path) -> None:
    place = changed(tmp_path, "org.vmbus1.Machine.xml", OWN, "")
    with pytest.raises(ContractError, match=r"Machine\.Start.*Own is missing"):
        contract.load(place)


def test_no_rule_without_a_reason(tmp_path: Path) -> None:
    place = changed(tmp_path, "org.vmbus1.Machine.xml", OWN, OWN.replace("org.vmbus1.machine.start", "none:"))
    with pytest.raises(ContractError, match="without a reason"):
        contract.load(place)


def test_an_action_of_somebody_else_is_refused(tmp_path: Path) -> None:
    place = changed(
        tmp_path,
        "org.vmbus1.Machine.xml",
        OWN,
        OWN.replace("org.vmbus1.machine.start", "org.freedesktop.login1.reboot"),
    )
    with pytest.raises(ContractError, match="not an action"):
        contract.load(place)


def test_a_property_needs_an_audience(tmp_path: Path) -> None:
    place = changed(
        tmp_path, "org.vmbus1.Job.xml", '<annotation name="org.vmbus1.Access.Read" value="private"/>', ""
    )
    with pytest.raises(ContractError, match="must be public or private"):
        contract.load(place)


def test_public_are_uuid_owner_and_state_alone() -> None:
    machine = contract.load()["org.vmbus1.Machine"]
    assert {name for name, p in machine.properties.items() if p.public} == {"Uuid", "Owner", "State"}

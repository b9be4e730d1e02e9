# SPDX-License-Identifier: Apache-2.0
"""polkit/org.vmbus1.policy and the access rules in dbus/*.xml are one set of actions."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[3]
POLICY = ElementTree.parse(ROOT / "polkit/org.vmbus1.policy").getroot()
ACTIONS = {action.get("id", ""): action for action in POLICY.iter("action")}
ASKED = {
    annotation.get("value", "")
    for file in (ROOT / "dbus").glob("*.xml")
    for method in ElementTree.parse(file).iter("method")
    for annotation in method.findall("annotation")
    if annotation.get("name", "").startswith("org.vmbus1.Access.")
    and not annotation.get("value", "").startswith("none:")
} | {"org.vmbus1.machine.read-any"}  # properties and signals: the annotation says "private"


def text(action: ElementTree.Element, path: str) -> str:
    found = action.findtext(path)
    assert found, f"{action.get('id')} has no {path}"
    return found


def test_each_action_that_a_method_asks_for_is_there_and_no_other() -> None:
    assert set(ACTIONS) == ASKED


@pytest.mark.parametrize("action", ACTIONS.values(), ids=ACTIONS.keys())
def test_the_service_user_owns_it_so_that_polkitd_answers_it(action: ElementTree.Element) -> None:
    owners = [a.text for a in action.findall("annotate") if a.get("key") == "org.freedesktop.policykit.owner"]
    assert owners == ["unix-user:vmbus"]


@pytest.mark.parametrize("action", ACTIONS.values(), ids=ACTIONS.keys())
def test_it_says_to_a_person_what_is_asked_for(action: ElementTree.Element) -> None:
    assert text(action, "message").startswith("Authentication is required to ")
    assert len(text(action, "description")) > 10


@pytest.mark.parametrize("name", [name for name in ACTIONS if name.split(".")[2] in ("machine", "job")])
def test_own_machines_need_no_session_and_others_an_administrator(name: str) -> None:
    defaults = [text(ACTIONS[name], f"defaults/allow_{who}") for who in ("any", "inactive", "active")]
    if name.endswith("-any"):
        assert defaults == ["auth_admin", "auth_admin", "auth_admin_keep"]
    else:
        assert defaults == ["yes", "yes", "yes"]


@pytest.mark.parametrize(
    "name", ["org.vmbus1.bridge.use", "org.vmbus1.interface.use", "org.vmbus1.hugepages.use"]
)
def test_what_belongs_to_the_host_needs_an_administrator(name: str) -> None:
    assert text(ACTIONS[name], "defaults/allow_any") == "auth_admin"
    assert text(ACTIONS[name], "defaults/allow_active") == "auth_admin_keep"


def test_the_example_rules_name_only_actions_that_exist() -> None:
    rules = (ROOT / "polkit/50-vmbus-example.rules").read_text()
    named = {word.strip('";,') for word in rules.split() if word.startswith('"org.vmbus1.')}
    assert named and named <= set(ACTIONS)

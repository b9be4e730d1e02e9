# SPDX-License-Identifier: Apache-2.0
"""Links between the documents lead somewhere, and commands that they name are there."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

from vmbus.cli import arguments

ROOT = Path(__file__).parents[3]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_to_a_file_leads_to_one(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text())
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (document.parent / target).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_make_target_that_is_named_exists(document: Path) -> None:
    named = set(re.findall(r"(?:`|^    )make ([a-z-]+)", document.read_text(), flags=re.M))
    makefiles = (ROOT / "Makefile").read_text() + (ROOT / "install.mk").read_text()
    assert named <= set(re.findall(r"^([a-z-]+):", makefiles, flags=re.M))


def test_every_benchmark_has_its_figures() -> None:
    text = (ROOT / "docs/performance.md").read_text()
    programs = {
        path.stem for path in (ROOT / "bench").glob("*.py") if "def main() -> None" in path.read_text()
    }
    assert programs
    named = set(re.findall(r"`python -m bench\.(\w+)`", text))
    assert named <= programs
    assert {"start", "memory", "list_machines", "port_exit"} <= named


def soak_tests() -> set[str]:
    """The tests that `make soak` runs."""
    found: set[str] = set()
    for path in ROOT.glob("tests/**/test_*.py"):
        tree = ast.parse(path.read_text())
        whole = any(
            isinstance(node, ast.Assign)
            and ast.unparse(node.targets[0]) == "pytestmark"
            and "pytest.mark.soak" in ast.unparse(node.value)
            for node in tree.body
        )
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
                marked = "pytest.mark.soak" in map(ast.unparse, node.decorator_list)
                found |= {node.name} if whole or marked else set()
    return found


def test_every_long_round_has_its_result() -> None:
    rows = re.findall(r"^\| `(test_\w+)` \| .+ \| .+ \|$", (ROOT / "docs/soak.md").read_text(), flags=re.M)
    assert sorted(rows) == sorted(soak_tests())


def test_vmbusctl_words_in_the_guides_are_what_it_takes() -> None:
    verbs = {command.name for command in arguments.COMMANDS}
    for document in DOCUMENTS:
        for line in re.findall(r"^    vmbusctl ([a-z-]+)", document.read_text(), flags=re.M):
            assert line in verbs, f"{document.name}: vmbusctl {line}"


def test_every_document_is_under_the_licence() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "*.md", "docs", "systemd", "dbus", "polkit", "selinux", "man", "completions"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.split()
    for name in listed:
        assert "SPDX-License-Identifier: Apache-2.0" in (ROOT / name).read_text()[:400], name

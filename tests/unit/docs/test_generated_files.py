# SPDX-License-Identifier: Apache-2.0
"""What is made from a source is what that source makes now, and the man pages are well-formed."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

from docs.make import bash_completion, dbus_api, img_man_page, man_page, zsh_completion
from vmbus.cli import arguments
from vmbus.wire import contract

ROOT = Path(__file__).parents[3]
MAKERS = (bash_completion, dbus_api, img_man_page, man_page, zsh_completion)
PAGES = sorted((ROOT / "man").iterdir())


@pytest.mark.parametrize("maker", MAKERS, ids=lambda maker: maker.OUTPUT)
def test_the_file_is_current(maker: ModuleType) -> None:
    assert (ROOT / maker.OUTPUT).read_text() == maker.text(), "run `make docs`"


def test_the_api_document_names_every_member_and_its_rule() -> None:
    document = (ROOT / "docs/dbus-api.md").read_text()
    for interface in contract.load().values():
        section = document.split(f"## {interface.name}\n")[1].split("\n## ")[0]
        for method in interface.methods.values():
            assert f"### {method.name}(" in section
            assert (method.own.action or method.own.reason) in section
        for name in interface.properties:
            assert f"| `{name}` |" in section
        for name in interface.signals:
            assert f"### signal {name}(" in section


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_man_page_formats_without_complaint(page: Path) -> None:
    if shutil.which("groff") is None:
        pytest.skip("needs groff: the package groff-base is not installed")
    found = subprocess.run(
        ["groff", "-man", "-Tutf8", "-ww", "-z", str(page)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (found.returncode, found.stderr) == (0, "")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_man_page_refers_only_to_pages_that_are_there(page: Path) -> None:
    ours = {path.name for path in PAGES}
    referred = re.findall(r"^\.BR (vmbus[a-z\\-]*) \((\d)\)", page.read_text(), flags=re.M)
    assert {f"{name.replace(chr(92), '')}.{section}" for name, section in referred} <= ours


def test_every_program_that_is_there_has_a_man_page() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    there = {
        name
        for name, target in scripts.items()
        if (ROOT / target.partition(":")[0].replace(".", "/")).with_suffix(".py").is_file()
    }
    assert len(there) >= 3
    assert there <= {path.stem for path in PAGES}


def test_every_option_of_the_daemons_is_in_their_pages() -> None:
    for program, source in (("vmbus-broker", "vmbus/broker/main.py"), ("vmbusd", "vmbus/service/main.py")):
        options = re.findall(r'add_argument\(\s*"(--[a-z-]+)"', (ROOT / source).read_text())
        page = (ROOT / f"man/{program}.8").read_text().replace("\\-", "-")
        assert options
        assert [option for option in options if option not in page] == []


def bash(words: list[str], fake: Path) -> list[str]:
    """What bash offers for the last of ``words``."""
    script = (
        f"source {ROOT}/completions/vmbusctl.bash; COMP_WORDS=({' '.join(map(repr, words))}); "
        f"COMP_CWORD={len(words) - 1}; _vmbusctl; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    )
    found = subprocess.run(
        ["bash", "--norc", "-c", script],
        env={"PATH": f"{fake}:/usr/bin:/bin"},
        cwd=fake,
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    )
    return [line for line in found.stdout.splitlines() if line]


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    """A directory with a vmbusctl that knows two machines, and a TOML file."""
    program = tmp_path / "vmbusctl"
    program.write_text(
        '#!/bin/sh\n[ "$*" = "--no-ask --no-autostart list --names" ] && printf "web\\nwiki\\n"\n'
    )
    program.chmod(0o755)
    (tmp_path / "web.toml").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["vmbusctl", "un"], ["undefine"]),
        (["vmbusctl", "--json", "sho"], ["show"]),
        (["vmbusctl", "--bus-name", "list", "ki"], ["kill"]),
        (["vmbusctl", "start", ""], ["web", "wiki"]),
        (["vmbusctl", "console", "wi"], ["wiki"]),
        (["vmbusctl", "define", "web."], ["web.toml"]),
        (["vmbusctl", "define", "--kernel", "web."], ["web.toml"]),
        (["vmbusctl", "wait", "web", "--state", "st"], ["stopped", "starting", "stopping"]),
        (["vmbusctl", "stop", "web", "--dead"], ["--deadline"]),
        (["vmbusctl", "define", "--memory", ""], []),
    ],
)
def test_bash_completes(words: list[str], offered: list[str], fake: Path) -> None:
    assert bash(words, fake) == offered


def test_bash_completes_every_verb(fake: Path) -> None:
    assert {command.name for command in arguments.COMMANDS} <= set(bash(["vmbusctl", ""], fake))


def test_zsh_accepts_its_script() -> None:
    if shutil.which("zsh") is None:
        pytest.skip("needs zsh: the package is not installed")
    subprocess.run(["zsh", "-n", str(ROOT / "completions/_vmbusctl")], check=True, timeout=20)


def test_the_help_of_each_verb_has_examples_that_its_parser_takes(capsys: pytest.CaptureFixture[str]) -> None:
    for command in arguments.COMMANDS:
        assert command.examples
        for line, _ in command.examples:
            words = [word for word in line.split() if not word.startswith(("<", ">"))]
            arguments.parse(words[1:])

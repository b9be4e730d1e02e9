#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""``make setup``: makes a Debian 12 machine ready to run and test vmbus from this checkout.

Steps, each of which says what it does and why, and does nothing when nothing is to be done:

    space      a warning when there is too little
    packages   setup/packages.txt, by name; the backports source is the distribution's own with another suite
    users      vmbus (the service) and two ordinary users for the tests, in no group but their own
    rust       a cargo of 1.85 or newer: one that is there, else Debian's rustc-web
    python     .venv from /usr/bin/python3 with what pyproject.toml names
    core       the Rust core in release mode, through maturin; the programs in .venv/bin
    bytecode   vmbus/ compiled: a worker cannot write into its root, so it would compile at every start

packages and users are looked up every time (a tenth of a second). python and core leave a stamp under
.cache/setup: the hash of all that they were made from. Runs with the standard library of the distribution's
Python alone, as root. What it leaves out: nothing is removed or upgraded that is not named in the list.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import pwd
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

CHECKOUT: Final = Path(__file__).resolve().parents[1]
CACHE: Final = Path(os.environ.get("VMBUS_CACHE") or CHECKOUT / ".cache").absolute()
VENV: Final = CHECKOUT / ".venv"
PYTHON: Final = "/usr/bin/python3"
CARGO_MINIMUM: Final = (1, 85)
SPACE: Final = 4 << 30  # bytes that a checkout takes, built and tested, with what the tests leave for a while
EXTRAS: Final = ("fast", "plot", "test")

SERVICE_USER: Final = "vmbus"
TEST_USERS: Final = ("vmbus-alice", "vmbus-bob")


class SetupFailed(Exception):
    """A step that could not be done; the message says what would help."""


def main() -> int:
    """Do the steps in order. Exit code 0, or 1 with a sentence on stderr."""
    begin = time.monotonic()
    try:
        if os.geteuid() != 0:
            raise SetupFailed("needs root: it installs packages and adds users")
        os.umask(0o022)
        CACHE.mkdir(parents=True, exist_ok=True)
        with (CACHE / "setup.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            space()
            packages("distribution", "backports")
            users()
            python()
            core()
            bytecode()
    except SetupFailed as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    say("done", f"{time.monotonic() - begin:.1f} s")
    return 0


def say(step: str, what: str) -> None:
    """One line for people."""
    print(f"setup: {step:<9} {what}", flush=True)


def space() -> None:
    """Warn if the disk is likely to fill: what fails then does not always say why."""
    free = shutil.disk_usage(CACHE).free
    if free < SPACE and not VENV.exists():
        say("space", f"{free / 2**30:.1f} GiB are free here; building and testing take about {SPACE >> 30}")


# -- packages


def wanted(section: str) -> dict[str, tuple[str, str]]:
    """Packages of a section of packages.txt: name to (least version or "", reason)."""
    found: dict[str, tuple[str, str]] = {}
    current = ""
    for line in (CHECKOUT / "setup/packages.txt").read_text().splitlines():
        if line.startswith("["):
            current = line.strip("[]")
        elif line and not line.startswith("#") and current == section:
            spec, reason = line.split(maxsplit=1)
            name, _, version = spec.partition(">=")
            found[name] = (version, reason)
    return found


def packages(*sections: str) -> None:
    """Install what is missing, by name; what has a least version comes from the backports if it is older."""
    named = {name: told for section in sections for name, told in wanted(section).items()}
    here = installed(named)
    missing = [name for name, (version, _) in named.items() if not version and name not in here]
    old = [
        name for name, (version, _) in named.items() if version and not at_least(here.get(name, ""), version)
    ]
    if not missing and not old:
        say("packages", f"all {len(named)} are there")
        return
    for name in missing:
        say("packages", f"installing {name}: {named[name][1]}")
    install(missing)
    if old:
        for name in old:
            say("packages", f"installing {name} {named[name][0]} or newer: {named[name][1]}")
        install(old, suite=backports())


def installed(names: Iterable[str]) -> dict[str, str]:
    """The versions of those of ``names`` that dpkg has installed."""
    shown = subprocess.run(
        ["dpkg-query", "-W", "-f", "${Package} ${db:Status-Abbrev} ${Version}\n", *names],
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    lines = (line.split() for line in shown.splitlines())
    return {words[0]: words[2] for words in lines if len(words) == 3 and words[1] == "ii"}


def at_least(version: str, least: str) -> bool:
    """Debian's comparison of versions; "" is older than all."""
    command = ["dpkg", "--compare-versions", version, "ge", least]
    return bool(version) and subprocess.run(command, check=False).returncode == 0


def install(names: list[str], *, suite: str = "") -> None:
    """apt-get install; the lists are fetched when a name is unknown or a file has gone from the archive."""
    if not names:
        return
    command = ["apt-get", "install", "-y", "-q", "--no-install-recommends", "-o", "DPkg::Lock::Timeout=300"]
    command += ["-t", suite] if suite else []
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    command += names
    for attempt in (1, 2):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return
        if attempt == 1:
            update()
    raise SetupFailed(f"apt-get install {' '.join(names)}:\n{done.stdout[-1000:]}{done.stderr[-2000:]}")


def update() -> None:
    """Fetch the package lists."""
    say("packages", "apt-get update: the lists here do not have what is needed")
    done = subprocess.run(["apt-get", "update", "-q"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SetupFailed(f"apt-get update:\n{done.stderr[-2000:]}")


def backports() -> str:
    """The name of the backports suite, whose source is added when there is none.

    "" when the distribution itself is newer than Debian 12 and needs none.
    """
    release = dict(
        line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line
    )
    if release.get("ID") != "debian" or not release.get("VERSION_ID", "").strip('"').isdigit():
        raise SetupFailed("this is not a Debian release: install the packages of setup/packages.txt by hand")
    if int(release["VERSION_ID"].strip('"')) > 12:
        return ""
    codename = release["VERSION_CODENAME"].strip('"')
    suite = f"{codename}-backports"
    sources = list(configured())
    if not any(suite in suites for _, suites, _ in sources):
        own = [(uri, signed) for uri, suites, signed in sources if codename in suites]
        if not own:
            raise SetupFailed(f"no package source for {codename} is configured")
        uri, signed = own[0]
        lines = ["Types: deb", f"URIs: {uri}", f"Suites: {suite}", "Components: main"]
        lines += [f"Signed-By: {signed}"] if signed else []
        target = Path("/etc/apt/sources.list.d/vmbus-backports.sources")
        target.write_text("\n".join(lines) + "\n")
        say("packages", f"added {target}: QEMU 10 and the 6.12 kernel are in {suite}")
        update()
    return suite


def configured() -> Iterator[tuple[str, list[str], str]]:
    """The binary package sources of this machine: (URI, suites, keyring or "")."""
    place = Path("/etc/apt")
    for file in sorted(place.glob("sources.list.d/*.sources")):
        for stanza in re.split(r"\n\s*\n", file.read_text()):
            pairs = re.findall(r"^(\S+):[ \t]*(.*)$", stanza, re.MULTILINE)
            fields = {key.lower(): value.strip() for key, value in pairs}
            if "deb" in fields.get("types", "").split() and fields.get("enabled", "yes") != "no":
                for uri in fields.get("uris", "").split():
                    yield uri, fields.get("suites", "").split(), fields.get("signed-by", "")
    for file in [place / "sources.list", *sorted(place.glob("sources.list.d/*.list"))]:
        for line in file.read_text().splitlines() if file.exists() else []:
            found = re.match(r"deb\s+(?:\[(.*?)\]\s+)?(\S+)\s+(\S+)", line)
            if found:
                signed = re.search(r"signed-by=(\S+)", found[1] or "")
                yield found[2], [found[3]], signed[1] if signed else ""


# -- users


def users() -> None:
    """The service's user, and ordinary users with home directories for the tests."""
    service = [SERVICE_USER, "--system", "--home-dir", "/var/lib/vmbus", "--no-create-home"]
    service += ["--shell", "/usr/sbin/nologin", "--user-group"]
    plans = [(service, "vmbusd runs as it, with no capability")]
    for name in TEST_USERS:
        plain = [name, "--create-home", "--shell", "/bin/bash", "--user-group"]
        plans.append((plain, "an ordinary user for tests, in no group but its own"))
    for (name, *options), why in plans:
        try:
            pwd.getpwnam(name)
        except KeyError:
            say("users", f"adding {name}: {why}")
            command(["/usr/sbin/useradd", *options, name])
    say("users", ", ".join((SERVICE_USER, *TEST_USERS)) + " are there")


# -- rust


def cargo() -> str:
    """The path of a cargo that is new enough; Debian's packages are installed when there is none."""
    candidates = [shutil.which("cargo"), str(Path.home() / ".cargo/bin/cargo"), "/usr/bin/cargo"]
    for candidate in candidates:
        if candidate and cargo_version(candidate) >= CARGO_MINIMUM:
            return candidate
    for name, (_, reason) in wanted("rust").items():
        say("rust", f"installing {name}: {reason}")
    install(list(wanted("rust")))
    if cargo_version("/usr/bin/cargo") < CARGO_MINIMUM:
        raise SetupFailed("Debian's cargo-web is older than 1.85: install a newer Rust")
    return "/usr/bin/cargo"


def cargo_version(path: str) -> tuple[int, ...]:
    """(major, minor) of a cargo, (0,) if it does not run."""
    try:
        shown = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    except OSError:
        return (0,)
    found = re.match(r"cargo (\d+)\.(\d+)", shown)
    return (int(found[1]), int(found[2])) if found else (0,)


# -- python and core


def python() -> None:
    """.venv, from the distribution's interpreter so that unprivileged users can read all of it."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())
    needed = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    for extra in EXTRAS:
        needed += project["project"]["optional-dependencies"].get(extra, [])
    made_from = digest([PYTHON, sys.version, str(VENV), *needed])
    if stamped("python", made_from) and (VENV / "bin/python").exists():
        say("python", f"{VENV.name} has what pyproject.toml names")
        return
    say("python", f"making {VENV.name} from {PYTHON} and fetching {len(needed)} packages of pyproject.toml")
    if not same_place():
        shutil.rmtree(VENV, ignore_errors=True)
    command([PYTHON, "-m", "venv", str(VENV)])
    command([str(VENV / "bin/python"), "-m", "pip", "install", "-q", *needed])
    stamp("python", made_from)


def same_place() -> bool:
    """Whether .venv was made at this path; its programs name it."""
    pip = VENV / "bin/pip"
    return pip.exists() and pip.read_text().startswith(f"#!{VENV}/")


def core() -> None:
    """The Rust core, and the programs beside it; .venv uses the checkout's vmbus/ as it is."""
    sources = [CHECKOUT / "pyproject.toml", *sorted(rust_sources())]
    parts = [f"{file.relative_to(CHECKOUT)}\0{file.read_bytes().hex()}" for file in sources]
    made_from = digest([str(VENV), *parts])
    built = (CHECKOUT / "vmbus/_native").is_dir() and (VENV / "bin/vmbusd").exists()
    if built and stamped("core", made_from):
        say("core", "the release build is current")
        return
    path = cargo()
    say("core", f"building native/ in release mode with {path} (its sources have changed)")
    environment = {**os.environ, "VIRTUAL_ENV": str(VENV)}
    environment["PATH"] = f"{VENV}/bin:{Path(path).parent}:{os.environ.get('PATH', os.defpath)}"
    command(
        [str(VENV / "bin/maturin"), "develop", "--release", "--quiet", "--extras", ",".join(EXTRAS)],
        env=environment,
        cwd=CHECKOUT,
    )
    stamp("core", made_from)


def bytecode() -> None:
    """What workers import, compiled once: it saves each of them a third of its start and half a megabyte."""
    command([str(VENV / "bin/python"), "-m", "compileall", "-q", "vmbus"], cwd=CHECKOUT)


def rust_sources() -> Iterator[Path]:
    """What the core is built from, without build products."""
    for place, directories, files in os.walk(CHECKOUT / "native"):
        directories[:] = [name for name in directories if name not in {"target", "fuzz"}]
        for name in files:
            if name.endswith((".rs", ".toml", ".lock", ".h", ".c", ".S", ".bin")):
                yield Path(place) / name


def digest(parts: Iterable[str]) -> str:
    """One hash for a list of texts."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part.encode() + b"\1")
    return whole.hexdigest()


def stamped(step: str, made_from: str) -> bool:
    """Whether ``step`` was done from exactly this."""
    file = CACHE / "setup" / step
    return file.exists() and file.read_text() == made_from


def stamp(step: str, made_from: str) -> None:
    """Remember that ``step`` was done from this."""
    file = CACHE / "setup" / step
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(made_from)


def command(argv: list[str], *, env: dict[str, str] | None = None, cwd: Path | None = None) -> None:
    """Run a command; its output is shown only when it fails."""
    done = subprocess.run(argv, env=env, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SetupFailed(f"{' '.join(argv)}:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")


if __name__ == "__main__":
    sys.exit(main())

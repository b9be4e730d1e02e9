# SPDX-License-Identifier: Apache-2.0
"""The libFuzzer targets of native/fuzz: kept inputs first, then new ones for a while.

Each run gets FUZZ_SHORT_SECONDS (default 40), and with --fuzz FUZZ_SECONDS (default 60). What breaks a
property is kept under .cache/fuzz, and the failure names it. They are an instrumented build of their own,
which takes minutes: not in make test-fast.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.lab.kernels import CHECKOUT

FUZZ = CHECKOUT / "native/fuzz"
BUILT = FUZZ / "target/x86_64-unknown-linux-gnu/release"
FOUND = CHECKOUT / ".cache/fuzz"
TARGETS = sorted(path.stem for path in (FUZZ / "targets").glob("*.rs"))
SHORT_SECONDS = int(os.environ.get("FUZZ_SHORT_SECONDS", "40"))
SECONDS = int(os.environ.get("FUZZ_SECONDS", "60"))

pytestmark = pytest.mark.skipif(shutil.which("cargo") is None, reason="cargo (rustup, or package cargo)")


def cargo(*words: str) -> None:
    done = subprocess.run(
        ["cargo", *words],
        cwd=FUZZ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:]


@pytest.fixture(scope="module")
def built() -> Path:
    """The directory of the programs. The first build takes a minute or two."""
    cargo("build", "--quiet", "--release")
    return BUILT


def fuzz(program: Path, corpus: Path, seconds: int) -> None:
    target = program.name
    FOUND.mkdir(parents=True, exist_ok=True)
    kept = [place for kind in ("corpus", "regressions") if (place := FUZZ / kind / target).is_dir()]
    seed = os.environ.get("FUZZ_SEED", "0")
    limits = [f"-max_total_time={seconds}", "-timeout=25", "-rss_limit_mb=1500", "-max_len=1500"]
    done = subprocess.run(
        [program, *limits, f"-seed={seed}", f"-artifact_prefix={FOUND}/{target}-", corpus, *kept],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        errors="replace",
        timeout=seconds + 240,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert "DONE" in done.stdout, done.stdout[-2000:]


def test_every_target_has_inputs_that_reach_far() -> None:
    assert TARGETS
    for target in TARGETS:
        assert any((FUZZ / "corpus" / target).iterdir())


@pytest.mark.long
@pytest.mark.timeout(900)
def test_rustfmt_and_clippy_find_nothing() -> None:
    cargo("fmt", "--check")
    cargo("clippy", "--quiet", "--release", "--", "-D", "warnings")


@pytest.mark.long
@pytest.mark.timeout(SHORT_SECONDS + 1200)
@pytest.mark.parametrize("target", TARGETS)
def test_kept_inputs_and_a_few_new_ones_break_nothing(target: str, built: Path, tmp_path: Path) -> None:
    fuzz(built / target, tmp_path, SHORT_SECONDS)


@pytest.mark.fuzz
@pytest.mark.timeout(SECONDS + 1200)
@pytest.mark.parametrize("target", TARGETS)
def test_random_inputs_break_nothing(target: str, built: Path, tmp_path: Path) -> None:
    fuzz(built / target, tmp_path, SECONDS)

# SPDX-License-Identifier: Apache-2.0
"""The emulator's fault is mended where it is, and nowhere else."""

from __future__ import annotations

import pytest

from tests.lab import mended
from tests.lab.emulator import EmulatorUnavailable

STATEMENT = """\
        if (ctl_has_irq(env)) {
            raise_it(cs);
        } else {
            withdraw_it(cs);
        }
"""
BEFORE = "    case 8:\n        remember(t0);\n"
AFTER = "        break;\n    }\n}\n"


def test_the_lock_is_taken_around_the_statement() -> None:
    locked = "        bql_lock();\n", STATEMENT, "        bql_unlock();\n"
    assert mended.mend(BEFORE + STATEMENT + AFTER) == BEFORE + "".join(locked) + AFTER


@pytest.mark.parametrize("times", [0, 2])
def test_a_source_in_which_it_is_not_there_once_is_left_alone(times: int) -> None:
    with pytest.raises(EmulatorUnavailable, match=f"is there {times} times, not once"):
        mended.mend(BEFORE + STATEMENT * times + AFTER)


def test_a_source_that_takes_the_lock_needs_no_mending() -> None:
    with pytest.raises(EmulatorUnavailable, match="takes the lock by itself"):
        mended.mend(mended.mend(BEFORE + STATEMENT + AFTER))

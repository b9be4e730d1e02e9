# SPDX-License-Identifier: Apache-2.0
"""Write every generated file: ``python -m docs.make``."""

from __future__ import annotations

from pathlib import Path

from docs.make import bash_completion, dbus_api, img_man_page, man_page, zsh_completion

ROOT = Path(__file__).parents[2]

for maker in (bash_completion, dbus_api, img_man_page, man_page, zsh_completion):
    place = ROOT / maker.OUTPUT
    place.parent.mkdir(exist_ok=True)
    place.write_text(maker.text())
    print(maker.OUTPUT)

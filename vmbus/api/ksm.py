# SPDX-License-Identifier: Apache-2.0
"""org.vmbus1.Ksm: same-page merging of the host."""

from __future__ import annotations

from typing import Any

from vmbus.api.machine import machine_path
from vmbus.bus import Variant
from vmbus.service.ksm import PAGE, Ksm, Value, machine_figures
from vmbus.service.standard import Caller
from vmbus.service.tuner import Tuner


class KsmObject:
    """The object at /org/vmbus1/ksm; its figures are read when they are asked for."""

    path = "/org/vmbus1/ksm"
    interface = "org.vmbus1.Ksm"
    owner: int | None = None

    def __init__(self, ksm: Ksm, tuner: Tuner) -> None:
        self._ksm, self._tuner = ksm, tuner

    def token(self) -> object:
        """It never changes."""
        return None

    def property(self, name: str) -> Any:
        """A property as a Variant."""
        match name:
            case "Available":
                return Variant("b", self._ksm.available)
            case "Settings":
                return Variant("a{sv}", _settings(self._ksm.settings()))
            case "Found":
                return Variant("a{sv}", _settings(self._ksm.found))
            case "Figures":
                return Variant("a{sv}", _figures(self._ksm.figures()))
            case "Tuner":
                return Variant("s", self._tuner.state)
            case "ActiveDomain":
                return Variant("s", self._ksm.active)
        raise KeyError(name)


def _settings(values: dict[str, Value]) -> dict[str, Any]:
    return {name: Variant("s" if isinstance(value, str) else "u", value) for name, value in values.items()}


def _figures(values: dict[str, int]) -> dict[str, Any]:
    return {name: Variant("x" if name == "profit" else "t", value) for name, value in values.items()}


class KsmApi:
    """Its methods."""

    def __init__(self, ksm: Ksm) -> None:
        self._ksm = ksm

    async def set(self, caller: Caller, item: KsmObject, settings: dict[str, Any]) -> None:
        """Set."""
        await self._ksm.set(settings)

    async def restore(self, caller: Caller, item: KsmObject) -> None:
        """Restore."""
        await self._ksm.restore()

    def get_machines(self, caller: Caller, item: KsmObject) -> dict[str, dict[str, Any]]:
        """GetMachines."""
        return {
            machine_path(machine.uuid): {
                "domain": Variant("s", self._ksm.domain(machine.owner)),
                **_figures(machine_figures(machine.worker.figures.ksm())),
            }
            for machine in self._ksm.offered()
            if machine.worker is not None and caller.uid in (0, machine.owner)
        }

    async def get_others(self, caller: Caller, item: KsmObject) -> list[list[Any]]:
        """GetOthers."""
        return [[m.pid, m.uid, m.name, m.merged * PAGE, m.profit] for m in await self._ksm.others()]

# SPDX-License-Identifier: Apache-2.0
"""What vmbus-img prints: JSON with qemu-img's keys, and the same for people."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from typing import Any

from vmbus.image import Layer, beside
from vmbus.wire.errors import VmbusError


def info(layer: Layer, found: dict[str, Any]) -> dict[str, Any]:
    """What ``qemu-img info --output=json`` says of one image."""
    child: dict[str, Any] = {
        "children": [],
        "virtual-size": found["file-size"],
        "filename": layer.path,
        "format": "file" if found["regular"] else "host_device",
        "actual-size": found["actual-size"],
        "dirty-flag": False,
    }
    child["format-specific"] = {"type": "file", "data": {}}
    described: dict[str, Any] = {
        "children": [{"name": "file", "info": child}],
        "virtual-size": found["virtual-size"],
        "filename": layer.path,
        "format": layer.format,
        "actual-size": found["actual-size"],
        "dirty-flag": False,
    }
    qcow2 = found.get("qcow2")
    if qcow2 is None:
        return described
    described["cluster-size"] = qcow2["cluster-size"]
    described["dirty-flag"] = qcow2["dirty"]
    if qcow2["backing-name"] is not None:
        described["backing-filename"] = qcow2["backing-name"]
        described["full-backing-filename"] = beside(layer.path, qcow2["backing-name"])
        if qcow2["backing-format"] is not None:
            described["backing-filename-format"] = qcow2["backing-format"]
    if qcow2["snapshots"]:
        described["snapshots"] = qcow2["snapshots"]
    if qcow2["encrypt"] is not None:
        described["encrypted"] = True
    described["format-specific"] = {"type": "qcow2", "data": _specific(qcow2)}
    return described


_ENCRYPT = (
    "ivgen-alg", "ivgen-hash-alg", "detached-header", "hash-alg", "cipher-alg", "uuid", "format",
    "cipher-mode", "slots", "payload-offset", "master-key-iters",
)  # fmt: skip


def _specific(qcow2: dict[str, Any]) -> dict[str, Any]:
    """What only qcow2 has, in the order in which qemu-img prints it."""
    version2 = qcow2["version"] == 2
    data: dict[str, Any] = {"compat": "0.10" if version2 else "1.1"}
    data["compression-type"] = qcow2["compression-type"]
    if not version2:
        data["lazy-refcounts"] = qcow2["lazy-refcounts"]
    if qcow2["bitmaps"]:
        keys = ("flags", "name", "granularity")
        data["bitmaps"] = [{key: one[key] for key in keys} for one in qcow2["bitmaps"]]
    data["refcount-bits"] = qcow2["refcount-bits"]
    if qcow2["encrypt"] is not None:
        data["encrypt"] = {key: qcow2["encrypt"][key] for key in _ENCRYPT if key in qcow2["encrypt"]}
    if qcow2["data-name"] is not None:
        data["data-file"] = qcow2["data-name"]
        data["data-file-raw"] = qcow2["data-raw"]
    if not version2:
        data["corrupt"] = qcow2["corrupt"]
        data["extended-l2"] = qcow2["extended-l2"]
    return data


def info_for_people(described: dict[str, Any]) -> str:
    """The same in lines."""
    length = described["virtual-size"]
    lines = [
        f"image: {described['filename']}",
        f"file format: {described['format']}",
        f"virtual size: {_size(length)} ({length} bytes)",
        f"disk size: {_size(described['actual-size'])}",
    ]
    if described.get("encrypted"):
        lines.append("encrypted: yes")
    if described["dirty-flag"]:
        lines.append("cleanly shut down: no")
    if "cluster-size" in described:
        lines.append(f"cluster_size: {described['cluster-size']}")
    if "backing-filename" in described:
        name, full = described["backing-filename"], described["full-backing-filename"]
        lines.append(f"backing file: {name}" + (f" (actual path: {full})" if full != name else ""))
        if "backing-filename-format" in described:
            lines.append(f"backing file format: {described['backing-filename-format']}")
    if "snapshots" in described:
        lines.append(snapshots_for_people(described["snapshots"]).rstrip("\n"))
    if "format-specific" in described:
        lines.append("Format specific information:")
        lines += _nested(described["format-specific"]["data"], "    ")
    for child in described["children"]:
        inner = child["info"]
        length = inner["virtual-size"]
        lines += [
            f"Child node '/{child['name']}':",
            f"    filename: {inner['filename']}",
            f"    protocol type: {inner['format']}",
            f"    file length: {_size(length)} ({length} bytes)",
            f"    disk size: {_size(inner['actual-size'])}",
        ]
    return "\n".join(lines)


def _nested(data: dict[str, Any], margin: str) -> list[str]:
    lines = []
    for key, value in data.items():
        name = margin + key.replace("-", " ")
        if isinstance(value, dict):
            lines += [f"{name}:", *_nested(value, margin + "    ")]
        elif isinstance(value, list):
            listed = {f"[{place}]": one for place, one in enumerate(value)}
            lines += [f"{name}:", *_nested(listed, margin + "    ")]
        else:
            lines.append(f"{name}: {str(value).lower() if isinstance(value, bool) else value}")
    return lines


def snapshots_for_people(snapshots: list[dict[str, Any]]) -> str:
    """A table of snapshots, nothing for none."""
    if not snapshots:
        return ""
    lines = [
        "Snapshot list:",
        f"{'ID':<7} {'TAG':<17} {'VM_SIZE':>7} {'DATE':>19} {'VM_CLOCK':>15} {'ICOUNT':>10}",
    ]
    for one in snapshots:
        date = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one["date-sec"]))
        seconds, fraction = one["vm-clock-sec"], one["vm-clock-nsec"] // 1_000_000
        clock = f"{seconds // 3600:04}:{seconds // 60 % 60:02}:{seconds % 60:02}.{fraction:03}"
        state = _size(one["vm-state-size"])
        lines.append(
            f"{one['id']:<7} {one['name']:<16} {state:>8} {date:>19} {clock:>15} "
            f"{one.get('icount', '--'):>10}"
        )
    return "\n".join(lines) + "\n"


def check(path: str, found: dict[str, Any]) -> dict[str, Any]:
    """What ``qemu-img check --output=json`` says."""
    always = ("image-end-offset", "total-clusters")
    described = {key: found[key] for key in always}
    described |= {"check-errors": 0, "filename": path, "format": "qcow2"}
    optional = set(found) - {*always, "messages"}
    return described | {key: found[key] for key in sorted(optional) if found[key]}


def check_for_people(found: dict[str, Any]) -> str:
    """The findings in words."""
    lines = []
    if found["corruptions-fixed"] or found["leaks-fixed"]:
        lines.append("The following inconsistencies were found and repaired:\n")
        lines.append(
            f"    {found['leaks-fixed']} leaked clusters\n    {found['corruptions-fixed']} corruptions\n"
        )
        lines.append("Double checking the fixed image now...")
    if not found["corruptions"] and not found["leaks"]:
        lines.append("No errors were found on the image.")
    if found["corruptions"]:
        lines.append(f"\n{found['corruptions']} errors were found on the image.")
        lines.append("Data may be corrupted, or further writes to the image may corrupt it.")
    if found["leaks"]:
        lines.append(f"\n{found['leaks']} leaked clusters were found on the image.")
        lines.append("This means waste of disk space, but no harm to data.")
    total, allocated = found["total-clusters"], found["allocated-clusters"]
    if total and allocated:
        fragmented, compressed = found["fragmented-clusters"], found["compressed-clusters"]
        lines.append(
            f"{allocated}/{total} = {allocated / total:.2%} allocated, "
            f"{fragmented / allocated:.2%} fragmented, {compressed / allocated:.2%} compressed clusters"
        )
    lines.append(f"Image end offset: {found['image-end-offset']}")
    return "\n".join(lines) + "\n"


def map_as_json(ranges: Iterable[dict[str, Any]]) -> None:
    """Print a map as a list, range by range."""
    separator = "["
    for one in ranges:
        print(separator, json.dumps(one), sep="", end="")
        separator = ",\n"
    print("[]" if separator == "[" else "]")


def map_for_people(ranges: Iterable[dict[str, Any]], paths: list[str]) -> None:
    """Print the ranges with data. Compressed ones have no place in a file and are refused, as by qemu-img."""
    print(f"{'Offset':<16}{'Length':<16}{'Mapped to':<16}File")
    for one in ranges:
        if one["data"] and "offset" not in one:
            message = "File contains external, encrypted or compressed clusters."
            raise VmbusError("NotSupported", message)
        if one["data"] and not one["zero"]:
            places = "".join(f"{_hex(one[key]):<16}" for key in ("start", "length", "offset"))
            print(f"{places}{paths[one['depth']]}")


def _hex(number: int) -> str:
    """As printf's %#x has it."""
    return f"{number:#x}" if number else "0"


def _size(length: int) -> str:
    """A size as qemu-img writes it: three digits and a unit."""
    value, unit = float(length), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB"):
        if value < 1000:
            break
        value, unit = value / 1024, larger
    return f"{value:.3g} {unit}"


def same_file(one: str, other: str) -> bool:
    """Whether two paths lead to the same file."""
    return os.path.samefile(one, other)

# SPDX-License-Identifier: Apache-2.0
"""``vmbus-broker``: options, the one process that runs as root, and its readiness.

It needs: CAP_SYS_ADMIN (namespaces, mounts), CAP_SETUID and CAP_SETGID (workers, owners), CAP_SETPCAP
(bounding sets, securebits), CAP_NET_ADMIN (taps), CAP_SYS_PTRACE (figures of non-dumpable workers), CAP_KILL,
CAP_CHOWN (its socket) and CAP_DAC_READ_SEARCH; CAP_SYS_RESOURCE lets it bound spare workers where there is no
cgroup. Everything that may block is done in children (children.py); SIGTERM ends the broker and no worker;
SIGHUP reads the policy again.
"""

from __future__ import annotations

import argparse
import os
import pwd
import resource
import signal
import socket
import sys
from pathlib import Path

import prctl

from vmbus.broker import service
from vmbus.broker.children import Crew
from vmbus.broker.loop import Loop
from vmbus.broker.owners import Owners
from vmbus.broker.policy import load
from vmbus.broker.requests import Requests
from vmbus.broker.steps import log
from vmbus.broker.uids import Uids
from vmbus.broker.workers import Workers
from vmbus.wire.errors import VmbusError


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="vmbus-broker", description="The privileged part of vmbus.")
    parser.add_argument("--instance", default="system", help="name of this instance (default: %(default)s)")
    parser.add_argument("--run-dir", type=Path, help="default: /run/vmbus/INSTANCE")
    parser.add_argument("--state-dir", type=Path, help="default: /var/lib/vmbus-broker/INSTANCE")
    parser.add_argument("--config", type=Path, default=Path("/etc/vmbus/broker.toml"))
    parser.add_argument("--service-user", default="vmbus", help="the user that vmbusd runs as")
    parser.add_argument(
        "--cgroup", type=Path, help="delegated cgroup v2 directory; default: vmbus-machines.service"
    )
    parser.add_argument("--spares", type=int, default=0, metavar="N", help="workers kept ready (default: 0)")
    options = parser.parse_args()
    if not options.instance.replace("-", "").replace("_", "").isalnum() or len(options.instance) > 32:
        parser.error("--instance: letters, digits, - and _, at most 32")
    if not 0 <= options.spares <= 64:
        parser.error("--spares: 0 … 64")
    options.run_dir = (options.run_dir or Path("/run/vmbus") / options.instance).absolute()
    options.state_dir = (options.state_dir or Path("/var/lib/vmbus-broker") / options.instance).absolute()
    return options


def _serve(options: argparse.Namespace) -> None:
    user = pwd.getpwnam(options.service_user)
    options.run_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
    prctl.set_name("vmbus-broker")
    prctl.set_child_subreaper(True)  # a worker's parent, its stager, ends before it
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    loop = Loop()
    crew = Crew(loop)
    bounds = load(options.config).workers
    locks = Path("/run/vmbus")
    locks.mkdir(mode=0o755, exist_ok=True)
    uids = Uids(
        bounds.uid_first, bounds.uid_count, lock=locks / "uids.lock", marker=options.run_dir / "next-uid"
    )
    owners = Owners(options.state_dir / "owners", crew)
    workers = Workers(
        loop,
        crew,
        uids,
        run=options.run_dir,
        instance=options.instance,
        base=options.cgroup,
        spares=options.spares,
    )
    requests = Requests(options.config, crew, owners, workers, options.instance)
    listener = service.listen(options.run_dir / "broker", user.pw_gid)
    serving = service.Service(loop, listener, user.pw_uid, requests)
    workers.ended = serving.tell
    workers.adopt()
    loop.on_signal(signal.SIGTERM, loop.stop)
    loop.on_signal(signal.SIGINT, loop.stop)
    loop.on_signal(signal.SIGHUP, requests.reload)
    if workers.cgroups.note:
        log(workers.cgroups.note)
    _ready()
    loop.run()
    log("ending; workers go on")


def _ready() -> None:
    log("ready")
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"READY=1", "\0" + address[1:] if address.startswith("@") else address)


def main() -> int:
    """Run until SIGTERM. 0; 1 if it cannot serve (the reason is on stderr)."""
    options = _options()
    os.umask(0o022)
    try:
        _serve(options)
    except (VmbusError, OSError, KeyError) as error:
        log(f"cannot serve: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

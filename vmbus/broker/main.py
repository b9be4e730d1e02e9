# SPDX-License-Identifier: Apache-2.0
"""``vmbus-broker``: options, the one process that runs as root, and its readiness.

It needs: CAP_SYS_ADMIN (namespaces, mounts), CAP_SETUID and CAP_SETGID (workers, owners), CAP_SETPCAP
(bounding sets, securebits), CAP_NET_ADMIN (taps, rules), CAP_SYS_PTRACE (figures of non-dumpable workers),
CAP_KILL, CAP_CHOWN (its socket) and CAP_DAC_READ_SEARCH; CAP_SYS_RESOURCE lets it bound spare workers where
there is no cgroup. Whatever may block is done in children. SIGTERM ends the broker and no worker; SIGHUP
reads the policy again.
"""

import argparse
import os
import pwd
import re
import resource
import signal
import socket
import sys
from pathlib import Path

import prctl

from vmbus.broker import cgroup, children, owners, policy, requests, service, uids, workers
from vmbus.broker.loop import Loop, Task, start
from vmbus.broker.steps import log

_SHARED = Path("/run/vmbus")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="vmbus-broker", description="The privileged part of vmbus.")
    parser.add_argument("--instance", default="system", help="name of this instance (default: %(default)s)")
    parser.add_argument("--run-dir", type=Path, help="default: /run/vmbus/INSTANCE")
    parser.add_argument("--state-dir", type=Path, help="default: /var/lib/vmbus-broker/INSTANCE")
    parser.add_argument("--config", type=Path, default=Path("/etc/vmbus/broker.toml"))
    parser.add_argument("--service-user", default="vmbus", help="the user that vmbusd runs as")
    parser.add_argument("--cgroup", type=Path, default=cgroup.DEFAULT, help="a delegated cgroup v2 directory")
    parser.add_argument("--mounts", default="/proc/self/ns/mnt", help="namespace of [[hugepages.mount]]")
    parser.add_argument("--spares", type=int, default=0, metavar="N", help="workers kept ready (default: 0)")
    options = parser.parse_args()
    if not re.fullmatch("[A-Za-z0-9_-]{1,32}", options.instance):
        parser.error("--instance: letters, digits, - and _, at most 32")
    options.run_dir = (options.run_dir or _SHARED / options.instance).absolute()
    options.state_dir = (options.state_dir or Path("/var/lib/vmbus-broker") / options.instance).absolute()
    return options


def _serve(options: argparse.Namespace, loop: Loop) -> Task[None]:
    user = pwd.getpwnam(options.service_user)
    run: Path = options.run_dir
    for directory in (_SHARED, run):
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
    prctl.set_child_subreaper(True)  # a worker's parent, its stager, ends before it
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    rules = policy.Policy(options.config, children.Crew(loop), options.instance, options.mounts)
    yield from rules.read()
    pool = uids.Uids(rules.survey.uid_first, rules.survey.uid_count, _SHARED / "uids.lock", run / "next-uid")
    records = owners.Owners(options.state_dir / "owners", rules)
    fleet = workers.Workers(pool, rules, options.instance, run=run, base=options.cgroup)
    yield from fleet.adopt(options.spares)
    operations = requests.Requests(records, fleet)
    listener = service.listen(run / "broker", user.pw_gid)
    fleet.ended = service.Service(loop, listener, user.pw_uid, operations).tell
    loop.on_signals({signal.SIGTERM: loop.stop, signal.SIGINT: loop.stop, signal.SIGHUP: operations.reload})
    log("; ".join([f"instance {options.instance}", *fleet.notes]))
    log("ready")
    if address := os.environ.get("NOTIFY_SOCKET", ""):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"READY=1", "\0" + address[1:] if address.startswith("@") else address)


def _serve_or_say_why_not(options: argparse.Namespace, loop: Loop) -> Task[None]:
    try:
        yield from _serve(options, loop)
    except Exception as error:
        log(f"cannot serve: {type(error).__name__}: {error}")
        loop.stop(1)


def main() -> int:
    """Run until SIGTERM. 0; 1 if it cannot serve (the reason is on stderr). Workers go on."""
    options = _options()
    os.umask(0o022)
    loop = Loop()
    start(_serve_or_say_why_not(options, loop))
    return loop.run()


if __name__ == "__main__":
    sys.exit(main())

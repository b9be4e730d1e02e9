# SPDX-License-Identifier: Apache-2.0
"""Code injected into a worker: everything it may try is refused, on the widest of its threads too.

The attacker is a process that has closed itself by the worker's own steps (worker_attacker.py) and tries.
"""

from __future__ import annotations

import errno
import os
import signal
from collections import Counter
from pathlib import Path

import pytest

from tests.local.worker_attacker import NUMBERS, RING_REQUESTS
from tests.local.worker_process import WorkerProcess

ATTACKER = str(Path(__file__).with_name("worker_attacker.py"))

# No code of a worker can get there by mistake: the process ends.
DEADLY = {
    *("socket", "connect", "sendmsg", "bind", "listen", "socketpair", "fork", "vfork", "execve", "shmget"),
    *("chroot", "mount", "umount2", "ptrace", "setuid", "init_module", "add_key", "request_key", "keyctl"),
    *("unshare", "perf_event_open", "fanotify_init", "open_by_handle_at", "sendmmsg", "setns"),
    *("process_vm_readv", "process_vm_writev", "finit_module", "memfd_create", "bpf", "execveat"),
    *("userfaultfd", "io_uring_setup", "open_tree", "fsopen", "pidfd_open", "pidfd_getfd"),
    *("process_madvise", "memfd_secret", "send an fd"),
}
# It lives and is told EPERM.
REFUSED = {
    *(set(NUMBERS) - DEADLY),
    *("read a file", "list a directory", "write a file", "a child process", "kill the parent", "huge pages"),
    "a private copy of a file",
    *("executable memory", "data made executable", "dumpable again", "a tap that stays"),
    "bytes into a terminal",
}

BUILDING = {"a private copy of a file"}
"""What the core may do until its machine is built: a clone's memory (native/sandbox/src/roles.rs)."""


def outcome(thread: str, attempt: str) -> int:
    """The errno of the attempt, 0 if it worked, or minus the signal that it died of."""
    with WorkerProcess(program=(ATTACKER, thread, attempt)) as attacker:
        code = attacker.wait()
        if code < 0:
            return code
        assert code == 0, attacker.log()
        return int(attacker.log().splitlines()[-1])


@pytest.mark.parametrize("thread", ["main", "core"])
@pytest.mark.parametrize("attempt", sorted(DEADLY))
def test_it_ends_the_process(thread: str, attempt: str) -> None:
    assert outcome(thread, attempt) == -signal.SIGSYS


@pytest.mark.parametrize(
    ("thread", "attempt"),
    [
        (thread, attempt)
        for thread, refused in (("main", REFUSED), ("core", REFUSED - BUILDING))
        for attempt in sorted(refused)
    ],
)
def test_it_is_refused(thread: str, attempt: str) -> None:
    assert outcome(thread, attempt) == errno.EPERM


@pytest.mark.requires("io-uring")
@pytest.mark.parametrize(
    "attempt", [f"ring: {name}" for name in RING_REQUESTS] + ["ring: read by descriptor"]
)
def test_the_core_s_ring_reads_and_writes_files_of_its_table_and_nothing_else(attempt: str) -> None:
    assert outcome("core", attempt) in (errno.EACCES, errno.EINVAL)  # EINVAL: older than this request
    assert outcome("core", "ring: read of an empty place") == errno.EBADF


@pytest.mark.requires("io-uring")
def test_the_main_thread_has_no_use_for_rings() -> None:
    assert outcome("main", "ring: read of an empty place") == errno.EPERM


def test_the_main_thread_cannot_even_start_a_thread() -> None:
    assert outcome("main", "a thread") != 0
    assert outcome("core", "a thread") == 0


@pytest.mark.parametrize("thread", ["main", "core"])
@pytest.mark.parametrize("attempt", ["send bytes", "memory"])
def test_what_a_worker_lives_by_works(thread: str, attempt: str) -> None:
    assert outcome(thread, attempt) == 0


def test_a_worker_shows_its_walls_in_proc() -> None:
    with WorkerProcess() as worker:
        worker.control()
        assert worker.status("Seccomp") == "2"
        assert worker.status("NoNewPrivs") == "1"
        for thread in os.listdir(f"/proc/{worker.pid}/task"):
            status = Path(f"/proc/{worker.pid}/task/{thread}/status").read_text()
            assert "Seccomp:\t2\n" in status


def test_a_worker_that_finds_files_in_its_root_ends_before_it_serves() -> None:
    hasty = "from vmbus.worker import main; main.EMPTY_ROOT_SECONDS = 0.2; main.main()"
    with WorkerProcess(program=("-c", hasty), expect_empty_root=True) as worker:
        assert worker.wait(seconds=20) == 1
        assert "could not wait until / is empty" in worker.log()


@pytest.mark.parametrize(
    "line", [b"", b"{}\n", b"no json\n", b'{"listen": -1, "kvm": 0, "status": 0}\n', b"x" * 5000]
)
def test_a_worker_with_a_wrong_startup_line_ends_and_says_why(line: bytes) -> None:
    with WorkerProcess(line=line) as worker:
        assert worker.wait() == 1
        assert "could not read the line on stdin" in worker.log()


def test_a_worker_whose_listening_descriptor_is_something_else_ends() -> None:
    line = b'{"listen": 0, "kvm": 1, "status": 2, "expect_empty_root": false}\n'
    with WorkerProcess(line=line) as worker:
        assert worker.wait() == 1
        assert "make the loop" in worker.log()


@pytest.mark.requires("io-uring")
def test_a_worker_holds_exactly_what_it_was_given_and_made() -> None:
    with WorkerProcess(kvm="/dev/zero") as worker:
        worker.control()
        directory = f"/proc/{worker.pid}/fd"
        held = Counter(os.readlink(f"{directory}/{fd}").split(":")[0] for fd in os.listdir(directory))
        log = next(name for name in held if name.startswith("/tmp/"))
        assert held == {
            "pipe": 1,  # stdin, at its end
            log: 2,  # stdout and stderr
            "/dev/zero": 1,  # in the place of /dev/kvm
            "socket": 4,  # listener, control, both ends of the console
            "anon_inode": 7,  # the loop, two eventfds of the core's thread, two rings and their eventfds
        }

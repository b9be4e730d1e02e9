// SPDX-License-Identifier: Apache-2.0
//! Each call that is not allowed really fails, each that is really works, by trying it in a forked child.

mod child;

use child::{errno_of, run, End};
use vmbus_sandbox::{close, landlock, narrow, Profile, Role};

const KILLED: End = End::Signal(libc::SIGSYS);
const REFUSED: End = End::Value(libc::EPERM);
const BAD: u64 = u64::MAX;

/// The errno of one call in a child closed with `profile`.
fn closed(profile: Profile, number: i64, args: [u64; 6]) -> End {
    run(|| match close(profile) {
        Ok(()) => errno_of(number, args),
        Err(_) => 255,
    })
}

fn in_role(role: Role, number: i64, args: [u64; 6]) -> End {
    run(|| {
        if close(Profile::Plain).is_err() || narrow(role, Profile::Plain).is_err() {
            return 255;
        }
        errno_of(number, args)
    })
}

/// The errno of the same call without any filter.
fn open(number: i64, args: [u64; 6]) -> End {
    run(|| errno_of(number, args))
}

/// Every call that some role names; the test below holds that there are no others.
const NAMED: &[i64] = &[
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_close,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_create1,
    libc::SYS_futex,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_restart_syscall,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_getrandom,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_accept4,
    libc::SYS_recvmsg,
    libc::SYS_shutdown,
    libc::SYS_fstat,
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_getpeername,
    libc::SYS_eventfd2,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    libc::SYS_timerfd_gettime,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_sync_file_range,
    libc::SYS_fallocate,
    libc::SYS_ftruncate,
    libc::SYS_lseek,
    libc::SYS_io_uring_enter,
    libc::SYS_mbind,
    libc::SYS_mlock2,
    // with some arguments only
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_prctl,
    libc::SYS_tgkill,
    libc::SYS_sendto,
    libc::SYS_recvfrom,
    libc::SYS_fcntl,
    libc::SYS_ioctl,
    libc::SYS_newfstatat,
    libc::SYS_io_uring_register,
    libc::SYS_clone,
    libc::SYS_seccomp,
    libc::SYS_statx,
    // answered with ENOSYS
    libc::SYS_clone3,
];

#[test]
fn no_call_passes_that_no_role_names() {
    for profile in [Profile::Plain, Profile::Vfio] {
        // To 600: beyond the newest call there is, and so beyond what tomorrow's kernels add.
        for number in (0..600).filter(|number| !NAMED.contains(number)) {
            let end = closed(profile, number, [BAD; 6]);
            // uretprobe and uprobe: a kernel that has them does not ask seccomp about them, and itself
            // turns away every caller that is not a probe's own trampoline.
            let trampoline = match number {
                335 => end == End::Signal(libc::SIGILL),
                336 => end == End::Value(libc::ENXIO),
                _ => false,
            };
            assert!(
                end == KILLED || end == REFUSED || trampoline,
                "system call {number} in {profile:?}: {end:?}"
            );
        }
    }
}

#[test]
fn the_same_calls_by_their_x32_numbers_are_refused() {
    for number in [0, 1, libc::SYS_openat, libc::SYS_socket, 513, 520] {
        let end = closed(Profile::Plain, number | 0x4000_0000, [BAD; 6]);
        assert!(
            end == KILLED || end == REFUSED,
            "x32 call {number}: {end:?}"
        );
    }
}

#[test]
fn what_only_an_attacker_calls_ends_the_process() {
    for number in [
        libc::SYS_execve,
        libc::SYS_execveat,
        libc::SYS_fork,
        libc::SYS_vfork,
        libc::SYS_ptrace,
        libc::SYS_process_vm_readv,
        libc::SYS_process_vm_writev,
        libc::SYS_pidfd_open,
        libc::SYS_pidfd_getfd,
        libc::SYS_socket,
        libc::SYS_socketpair,
        libc::SYS_connect,
        libc::SYS_bind,
        libc::SYS_listen,
        libc::SYS_sendmsg,
        libc::SYS_sendmmsg,
        libc::SYS_memfd_create,
        libc::SYS_userfaultfd,
        libc::SYS_mount,
        libc::SYS_unshare,
        libc::SYS_setns,
        libc::SYS_bpf,
        libc::SYS_perf_event_open,
        libc::SYS_io_uring_setup,
        libc::SYS_keyctl,
        libc::SYS_add_key,
        libc::SYS_request_key,
    ] {
        assert_eq!(
            closed(Profile::Plain, number, [0; 6]),
            KILLED,
            "system call {number}"
        );
    }
}

#[test]
fn a_path_cannot_be_opened_and_the_process_lives_to_hear_it() {
    let path = c"/".as_ptr() as u64;
    for (number, args) in [
        (libc::SYS_open, [path, 0, 0, 0, 0, 0]),
        (libc::SYS_openat, [libc::AT_FDCWD as u64, path, 0, 0, 0, 0]),
        (
            libc::SYS_openat2,
            [libc::AT_FDCWD as u64, path, 0, 24, 0, 0],
        ),
        (libc::SYS_stat, [path, 0, 0, 0, 0, 0]),
        (libc::SYS_statx, [libc::AT_FDCWD as u64, path, 0, 0, 0, 0]),
        (
            libc::SYS_newfstatat,
            [libc::AT_FDCWD as u64, path, 0, 0, 0, 0],
        ),
        (libc::SYS_readlink, [path, 0, 0, 0, 0, 0]),
        (libc::SYS_unlink, [path, 0, 0, 0, 0, 0]),
        (libc::SYS_kill, [1, 0, 0, 0, 0, 0]),
        (
            libc::SYS_kill,
            [u64::from(std::process::id()), 0, 0, 0, 0, 0],
        ),
    ] {
        assert_eq!(
            closed(Profile::Plain, number, args),
            REFUSED,
            "system call {number}"
        );
    }
}

#[test]
fn clone3_looks_absent() {
    let absent = End::Value(libc::ENOSYS);
    assert_eq!(closed(Profile::Plain, libc::SYS_clone3, [0; 6]), absent);
    for role in [
        Role::Main,
        Role::Control,
        Role::Vcpu,
        Role::Block,
        Role::Network,
        Role::Memory,
        Role::Crew,
        Role::Migration,
    ] {
        assert_eq!(in_role(role, libc::SYS_clone3, [0; 6]), absent, "{role:?}");
    }
}

#[test]
fn what_is_open_can_be_looked_at() {
    let end = run(|| {
        let Ok(file) = std::fs::File::open("/proc/self/exe") else {
            return 255;
        };
        if close(Profile::Plain).is_err() {
            return 254;
        }
        i32::from(file.metadata().is_ok_and(|metadata| metadata.len() > 0))
    });
    assert_eq!(end, End::Value(1));
}

#[test]
fn allowed_calls_answer_as_without_a_filter() {
    // Without arguments that could end, block or bend the child; what comes back (EBADF, EFAULT, success)
    // must be what the kernel says itself.
    let stays_away = [
        libc::SYS_exit,
        libc::SYS_exit_group,
        libc::SYS_rt_sigreturn,
        libc::SYS_restart_syscall,
        libc::SYS_clone,
        libc::SYS_clone3,
        libc::SYS_statx,
        libc::SYS_rseq,
        libc::SYS_munmap,
        libc::SYS_mmap,
        libc::SYS_mprotect,
        libc::SYS_prctl,
        libc::SYS_tgkill,
        libc::SYS_fcntl,
        libc::SYS_ioctl,
        libc::SYS_newfstatat,
        libc::SYS_io_uring_register,
        libc::SYS_seccomp,
        libc::SYS_sendto,
        libc::SYS_recvfrom,
    ];
    for number in NAMED.iter().filter(|number| !stays_away.contains(number)) {
        let args = [BAD; 6];
        let end = closed(Profile::Plain, *number, args);
        assert_eq!(end, open(*number, args), "system call {number}");
        assert_ne!(end, REFUSED, "system call {number}");
    }
}

#[test]
fn threads_start_under_the_filter_and_end() {
    let end = run(|| {
        if close(Profile::Plain).is_err() {
            return 255;
        }
        let threads: Vec<_> = (0..4)
            .map(|n| {
                std::thread::Builder::new()
                    .name("vcpu".into())
                    .spawn(move || n * 2)
            })
            .collect();
        let mut sum = 0;
        for thread in threads {
            match thread.map(std::thread::JoinHandle::join) {
                Ok(Ok(n)) => sum += n,
                _ => return 254,
            }
        }
        sum
    });
    assert_eq!(end, End::Value(12));
}

#[test]
fn clone_makes_threads_only() {
    let thread = libc::CLONE_VM
        | libc::CLONE_FS
        | libc::CLONE_FILES
        | libc::CLONE_SIGHAND
        | libc::CLONE_THREAD
        | libc::CLONE_SYSVSEM;
    let thread = u64::from(thread as u32);
    // fork's, vfork's, each namespace's, and a thread's flags with one bit too few or too many.
    let mut flags = vec![
        libc::SIGCHLD as u64,
        0,
        (libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD) as u64,
        thread | u64::from(libc::CLONE_NEWUSER as u32),
        thread | u64::from(libc::CLONE_NEWNS as u32),
        thread | u64::from(libc::CLONE_NEWNET as u32),
        thread | u64::from(libc::CLONE_NEWPID as u32),
        thread | u64::from(libc::CLONE_PTRACE as u32),
        thread | u64::from(libc::CLONE_PIDFD as u32),
        thread | u64::from(libc::CLONE_VFORK as u32),
        thread | u64::from(libc::CLONE_UNTRACED as u32),
        thread | libc::SIGCHLD as u64,
        // above 32 bits the kernel does not look, and neither may the filter
        1 << 32 | libc::SIGCHLD as u64,
    ];
    flags.extend(
        (0..32)
            .map(|bit| 1u64 << bit)
            .filter(|bit| thread & bit != 0)
            .map(|bit| thread & !bit),
    );
    for flags in flags {
        assert_eq!(
            closed(Profile::Plain, libc::SYS_clone, [flags, 0, 0, 0, 0, 0]),
            REFUSED,
            "{flags:#x}"
        );
    }
}

#[test]
fn memory_never_becomes_executable_and_never_comes_from_the_huge_page_pool() {
    let anonymous = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
    let map = |prot: i32, flags: u64| {
        closed(
            Profile::Plain,
            libc::SYS_mmap,
            [0, 4096, prot as u64, flags, BAD, 0],
        )
    };
    assert_eq!(
        map(libc::PROT_READ | libc::PROT_WRITE, anonymous),
        End::Value(0)
    );
    assert_eq!(map(libc::PROT_READ | libc::PROT_EXEC, anonymous), REFUSED);
    assert_eq!(map(libc::PROT_EXEC, anonymous), REFUSED);
    // A file: shared; and privately while a machine is built. The kernel says EBADF to what passes.
    let private = libc::MAP_PRIVATE as u64;
    assert_ne!(map(libc::PROT_READ, libc::MAP_SHARED as u64), REFUSED);
    assert_ne!(map(libc::PROT_READ | libc::PROT_WRITE, private), REFUSED);
    for file in [private, libc::MAP_SHARED as u64] {
        assert_eq!(map(libc::PROT_READ | libc::PROT_EXEC, file), REFUSED);
    }
    for file in [
        libc::MAP_SHARED_VALIDATE,
        libc::MAP_PRIVATE | libc::MAP_HUGETLB,
    ] {
        assert_eq!(map(libc::PROT_READ, file as u64), REFUSED);
    }
    for huge in [0, libc::MAP_HUGE_2MB as u64, libc::MAP_HUGE_1GB as u64] {
        let flags = anonymous | libc::MAP_HUGETLB as u64 | huge;
        assert_eq!(map(libc::PROT_READ, flags), REFUSED);
    }
    let end = run(|| {
        // SAFETY: a fresh anonymous page.
        let page = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                4096,
                libc::PROT_READ,
                anonymous as i32,
                -1,
                0,
            )
        };
        if page == libc::MAP_FAILED || close(Profile::Plain).is_err() {
            return 255;
        }
        let page = page as u64;
        if errno_of(libc::SYS_mprotect, [page, 4096, 3, 0, 0, 0]) != 0 {
            return 254;
        }
        errno_of(libc::SYS_mprotect, [page, 4096, 5, 0, 0, 0])
    });
    assert_eq!(end, REFUSED);
}

#[test]
fn a_tap_stays_as_it_was_made_and_devices_are_asked_by_number() {
    for (request, name) in [
        (0x4004_54cb_u64, "TUNSETPERSIST"),
        (0x4004_54cc, "TUNSETOWNER"),
        (0x4004_54ce, "TUNSETGROUP"),
        (0x4004_54ca, "TUNSETIFF"),
        (0x4004_54cd, "TUNSETLINK"),
        (0x8004_54e0, "TUNSETSTEERINGEBPF"),
        (0x8004_54e1, "TUNSETFILTEREBPF"),
        (0x0000_af02, "VHOST_RESET_OWNER"),
        (0x4008_af04, "VHOST_SET_LOG_BASE"),
        (0x4004_af07, "VHOST_SET_LOG_FD"),
        (0x8004_af08, "VHOST_NEW_WORKER"),
        (0x8008_af00, "VHOST_GET_FEATURES"),
        (0x0000_8924, "SIOCSIFHWADDR"),
        (0x0000_5412, "TIOCSTI"),
        (0x4004_9409, "FICLONE"),
        (0x4018_aee1, "KVM_SET_DEVICE_ATTR"),
        (0x0000_3b71, "VFIO_IOMMU_MAP_DMA"),
        (0xc00c_aee0, "KVM_CREATE_DEVICE"),
    ] {
        assert_eq!(
            closed(Profile::Plain, libc::SYS_ioctl, [BAD, request, 0, 0, 0, 0]),
            REFUSED,
            "{name}"
        );
        let high = request | 0xdead_beef_0000_0000;
        assert_eq!(
            closed(Profile::Plain, libc::SYS_ioctl, [BAD, high, 0, 0, 0, 0]),
            REFUSED,
            "{name}"
        );
    }
    for (request, name) in [
        (0xae80_u64, "KVM_RUN"),
        (0x4004_54d0, "TUNSETOFFLOAD"),
        (0xae01, "KVM_CREATE_VM"),
    ] {
        let end = closed(Profile::Plain, libc::SYS_ioctl, [BAD, request, 0, 0, 0, 0]);
        assert_eq!(end, End::Value(libc::EBADF), "{name}");
    }
}

#[test]
fn the_vfio_profile_adds_vfio_and_nothing_else() {
    for request in [0x3b71, 0xc00c_aee0, 0x4018_aee1] {
        let end = closed(Profile::Vfio, libc::SYS_ioctl, [BAD, request, 0, 0, 0, 0]);
        assert_eq!(end, End::Value(libc::EBADF), "{request:#x}");
    }
    assert_eq!(
        closed(
            Profile::Vfio,
            libc::SYS_ioctl,
            [BAD, 0x4004_54cb, 0, 0, 0, 0]
        ),
        REFUSED
    );
}

#[test]
fn sends_have_no_address() {
    let end = |number| closed(Profile::Plain, number, [BAD, 0, 0, 0, 0, 0]);
    assert_eq!(end(libc::SYS_sendto), End::Value(libc::EBADF));
    assert_eq!(end(libc::SYS_recvfrom), End::Value(libc::EBADF));
    let to = closed(Profile::Plain, libc::SYS_sendto, [BAD, 0, 0, 0, 0x1000, 16]);
    assert_eq!(to, REFUSED);
}

#[test]
fn signals_reach_threads_of_this_process_only() {
    let end = run(|| {
        if close(Profile::Plain).is_err() {
            return 255;
        }
        // SAFETY: getpid and gettid take nothing.
        let (pid, tid) = unsafe { (libc::getpid() as u64, libc::gettid() as u64) };
        errno_of(libc::SYS_tgkill, [pid, tid, 0, 0, 0, 0])
    });
    assert_eq!(end, End::Value(0));
    let parent = u64::from(std::process::id());
    assert_eq!(
        closed(
            Profile::Plain,
            libc::SYS_tgkill,
            [parent, parent, 0, 0, 0, 0]
        ),
        REFUSED
    );
    assert_eq!(
        closed(Profile::Plain, libc::SYS_tkill, [parent, 0, 0, 0, 0, 0]),
        REFUSED
    );
}

#[test]
fn rings_only_get_other_files() {
    for opcode in 0..40_u64 {
        let end = closed(
            Profile::Plain,
            libc::SYS_io_uring_register,
            [BAD, opcode, 0, 0, 0, 0],
        );
        if opcode == 6 || opcode == 14 {
            assert_ne!(end, REFUSED, "opcode {opcode}");
        } else {
            assert_eq!(end, REFUSED, "opcode {opcode}");
        }
    }
}

#[test]
fn prctl_names_threads_and_little_else() {
    for option in (1..80_u64).filter(|o| ![15, 38].contains(o)) {
        assert_eq!(
            closed(Profile::Plain, libc::SYS_prctl, [option, 0, 0, 0, 0, 0]),
            REFUSED,
            "prctl {option}"
        );
    }
    let name = c"worker".as_ptr() as u64;
    assert_eq!(
        closed(Profile::Plain, libc::SYS_prctl, [15, name, 0, 0, 0, 0]),
        End::Value(0)
    );
    for role in [
        Role::Main,
        Role::Vcpu,
        Role::Block,
        Role::Network,
        Role::Memory,
        Role::Crew,
        Role::Migration,
    ] {
        assert_eq!(
            in_role(role, libc::SYS_prctl, [38, 1, 0, 0, 0, 0]),
            REFUSED,
            "{role:?}"
        );
    }
}

#[test]
fn a_filter_can_only_be_added_plainly() {
    // Strict mode, TSYNC, a listener: none.
    for (operation, flags) in [(0, 0), (1, 1), (1, 8), (1, 2), (2, 0)] {
        let end = closed(
            Profile::Plain,
            libc::SYS_seccomp,
            [operation, flags, 0, 0, 0, 0],
        );
        assert_eq!(end, REFUSED, "operation {operation}, flags {flags}");
    }
    let end = closed(Profile::Plain, libc::SYS_seccomp, [1, 0, 0, 0, 0, 0]);
    assert_eq!(end, End::Value(libc::EFAULT));
}

/// (call, arguments, the roles that may)
type Right = (&'static str, i64, [u64; 6], &'static [Role]);

#[test]
fn each_role_has_what_it_does_and_not_what_the_others_do() {
    const EVERY: [Role; 8] = [
        Role::Main,
        Role::Control,
        Role::Vcpu,
        Role::Block,
        Role::Network,
        Role::Memory,
        Role::Crew,
        Role::Migration,
    ];
    let rights: &[Right] = &[
        ("accept4", libc::SYS_accept4, [BAD; 6], &[Role::Main]),
        ("recvmsg", libc::SYS_recvmsg, [BAD; 6], &[Role::Main]),
        (
            "KVM_RUN",
            libc::SYS_ioctl,
            [BAD, 0xae80, 0, 0, 0, 0],
            &[Role::Control, Role::Vcpu],
        ),
        (
            "KVM_CREATE_VCPU",
            libc::SYS_ioctl,
            [BAD, 0xae41, 0, 0, 0, 0],
            &[],
        ),
        (
            "a private mapping of a file",
            libc::SYS_mmap,
            [
                0,
                4096,
                libc::PROT_READ as u64,
                libc::MAP_PRIVATE as u64,
                BAD,
                0,
            ],
            &[],
        ),
        (
            "KVM_CREATE_VM",
            libc::SYS_ioctl,
            [BAD, 0xae01, 0, 0, 0, 0],
            &[],
        ),
        (
            "KVM_SET_CLOCK",
            libc::SYS_ioctl,
            [BAD, 0x4030_ae7b, 0, 0, 0, 0],
            &[Role::Control],
        ),
        (
            "KVM_GET_DIRTY_LOG",
            libc::SYS_ioctl,
            [BAD, 0x4010_ae42, 0, 0, 0, 0],
            &[Role::Migration],
        ),
        (
            "getpeername",
            libc::SYS_getpeername,
            [BAD; 6],
            &[Role::Migration],
        ),
        (
            "getsockopt",
            libc::SYS_getsockopt,
            [BAD; 6],
            &[Role::Main, Role::Migration],
        ),
        (
            "KVM_IRQFD",
            libc::SYS_ioctl,
            [BAD, 0x4020_ae76, 0, 0, 0, 0],
            &[Role::Control, Role::Vcpu],
        ),
        (
            "pwrite64",
            libc::SYS_pwrite64,
            [BAD; 6],
            &[Role::Control, Role::Block, Role::Crew, Role::Migration],
        ),
        (
            "pwritev",
            libc::SYS_pwritev,
            [BAD; 6],
            &[Role::Control, Role::Block, Role::Migration],
        ),
        (
            "F_OFD_SETLK",
            libc::SYS_fcntl,
            [BAD, libc::F_OFD_SETLK as u64, 0, 0, 0, 0],
            &[Role::Control, Role::Block],
        ),
        (
            "io_uring_enter",
            libc::SYS_io_uring_enter,
            [BAD; 6],
            &[Role::Control, Role::Block],
        ),
        (
            "BLKGETSIZE64",
            libc::SYS_ioctl,
            [BAD, 0x8008_1272, 0, 0, 0, 0],
            &[Role::Control, Role::Block],
        ),
        (
            "TUNSETOFFLOAD",
            libc::SYS_ioctl,
            [BAD, 0x4004_54d0, 0, 0, 0, 0],
            &[Role::Control, Role::Network],
        ),
        (
            "TUNATTACHFILTER",
            libc::SYS_ioctl,
            [BAD, 0x4010_54d5, 0, 0, 0, 0],
            &[Role::Network],
        ),
        (
            "VHOST_SET_MEM_TABLE",
            libc::SYS_ioctl,
            [BAD, 0x4008_af03, 0, 0, 0, 0],
            &[Role::Network],
        ),
        (
            "VHOST_NET_SET_BACKEND",
            libc::SYS_ioctl,
            [BAD, 0x4008_af30, 0, 0, 0, 0],
            &[Role::Network],
        ),
        ("seccomp", libc::SYS_seccomp, [1, 0, 0, 0, 0, 0], &[]),
        ("madvise", libc::SYS_madvise, [BAD; 6], &EVERY),
        ("mlock2", libc::SYS_mlock2, [BAD; 6], &[]),
        ("mbind", libc::SYS_mbind, [BAD; 6], &[]),
        (
            "MADV_MERGEABLE",
            libc::SYS_madvise,
            [0, 0, libc::MADV_MERGEABLE as u64, 0, 0, 0],
            &[],
        ),
        ("write", libc::SYS_write, [BAD; 6], &EVERY),
        ("futex", libc::SYS_futex, [BAD; 6], &EVERY),
        ("sendto", libc::SYS_sendto, [BAD, 0, 0, 0, 0, 0], &EVERY),
    ];
    for (name, number, args, may) in rights {
        for role in EVERY {
            let end = in_role(role, *number, *args);
            assert_eq!(
                end != REFUSED,
                may.contains(&role),
                "{name} by {role:?}: {end:?}"
            );
            assert_ne!(end, End::Value(255), "the filter of {role:?}");
        }
    }
}

#[test]
fn no_role_makes_threads() {
    let spawns = |role| {
        run(move || {
            if close(Profile::Plain).is_err() || narrow(role, Profile::Plain).is_err() {
                return 255;
            }
            i32::from(std::thread::Builder::new().spawn(|| ()).is_ok())
        })
    };
    for role in [
        Role::Main,
        Role::Control,
        Role::Vcpu,
        Role::Block,
        Role::Network,
        Role::Memory,
        Role::Crew,
        Role::Migration,
    ] {
        assert_eq!(spawns(role), End::Value(0), "{role:?}");
    }
}

#[test]
fn landlock_denies_every_path_where_the_kernel_has_it() {
    let end = run(|| match landlock::deny_all() {
        Ok(0) => 254,
        Ok(_) => {
            let path = c"/proc/self/status".as_ptr() as u64;
            errno_of(libc::SYS_openat, [libc::AT_FDCWD as u64, path, 0, 0, 0, 0])
        }
        Err(_) => 255,
    });
    if landlock::abi() == 0 {
        eprintln!("absent on this kernel: Landlock");
        assert_eq!(end, End::Value(254));
    } else {
        assert_eq!(end, End::Value(libc::EACCES));
    }
}

// SPDX-License-Identifier: Apache-2.0
//! What each kind of thread may call. The base filter is the union of these and of what it takes to build a
//! machine; the one thread that does that narrows itself to `Control` when it is done.
//!
//! A role's list has what the thread does (`virtio`, `kvm`, the Python loop) and what libc and the two
//! runtimes do beneath it: locks, heap, signals to a thread of the same process, clocks.
//! Arguments are compared where an argument is what makes a call dangerous.

use std::collections::BTreeMap;

use seccompiler::{SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompRule};

use crate::filter::Profile;
use crate::ioctls;
use crate::Error;

/// What a thread of a worker does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The Python thread: control channel, inlet, console hub. Receives descriptors, makes no thread,
    /// asks KVM nothing.
    Main,
    /// The machine's control thread, and the core's thread once it has built the machine: what the others
    /// may and the state of the whole, but no new thread and no new VM.
    Control,
    /// KVM_RUN and what a device's register may trigger.
    Vcpu,
    /// Reads and writes images, through its io_uring or without.
    Block,
    /// Reads and writes taps.
    Network,
    /// Works on memory alone: gives the guest's to the host and takes it back (madvise, which every role has), or expands
    /// and encrypts what I/O threads have read or will write. And it waits.
    Memory,
    /// Goes over the guest's memory: touches it, moves it to and from the file of a saved machine.
    Crew,
    /// Moves the guest's memory through a socket, and asks KVM what the guest has written to.
    Migration,
}

/// Allowed system calls: no rule means with any arguments, several rules mean any of them.
pub(crate) struct Allowed(BTreeMap<i64, Vec<SeccompRule>>);

type Check = (u8, SeccompCmpOp, u64);

impl Allowed {
    fn new() -> Allowed {
        Allowed(BTreeMap::new())
    }

    fn always(&mut self, calls: &[i64]) {
        for call in calls {
            self.0.insert(*call, Vec::new());
        }
    }

    /// Allows `call` when all `checks` (argument, comparison, 32-bit value) hold, and as already allowed.
    fn when(&mut self, call: i64, checks: &[Check]) -> Result<(), Error> {
        if self.0.get(&call).is_some_and(Vec::is_empty) {
            return Ok(());
        }
        let conditions = checks
            .iter()
            .map(|(argument, op, value)| {
                SeccompCondition::new(*argument, SeccompCmpArgLen::Dword, op.clone(), *value)
            })
            .collect::<Result<Vec<_>, _>>()?;
        let rule = SeccompRule::new(conditions)?;
        let rules = self.0.entry(call).or_default();
        if !rules.contains(&rule) {
            rules.push(rule);
        }
        Ok(())
    }

    /// Allows `call` with argument `argument` equal to one of `values`.
    fn one_of(&mut self, call: i64, argument: u8, values: &[i32]) -> Result<(), Error> {
        for value in values {
            // Compared as 32 bits, as the kernel reads them.
            self.when(
                call,
                &[(argument, SeccompCmpOp::Eq, u64::from(*value as u32))],
            )?;
        }
        Ok(())
    }

    fn ioctls(&mut self, requests: &[u32]) -> Result<(), Error> {
        for request in requests {
            self.when(
                libc::SYS_ioctl,
                &[(1, SeccompCmpOp::Eq, u64::from(*request))],
            )?;
        }
        Ok(())
    }

    pub(crate) fn into_rules(self) -> BTreeMap<i64, Vec<SeccompRule>> {
        self.0
    }
}

/// What every thread does, whatever its work: heap, locks, its own end.
fn runtime(allowed: &mut Allowed) -> Result<(), Error> {
    allowed.always(&[
        libc::SYS_read,
        libc::SYS_write,
        libc::SYS_close,
        libc::SYS_poll,
        libc::SYS_ppoll,
        libc::SYS_epoll_wait,
        libc::SYS_epoll_pwait,
        libc::SYS_futex,
        libc::SYS_munmap,
        libc::SYS_mremap,
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
        libc::SYS_sched_getaffinity, // pthread_getattr_np, at the start of a Rust thread
        libc::SYS_getpid,
        libc::SYS_gettid,
        libc::SYS_getrandom,
        libc::SYS_set_robust_list,
        libc::SYS_rseq,
        libc::SYS_exit,
        libc::SYS_exit_group,
    ]);
    // W^X: nothing becomes executable that was not at the start. Huge pages come as a sealed memfd from
    // the broker, which counts them: so none by a flag, and no private mapping of a file, whose copies of that
    // memfd's pages would be further ones of the pool (but see `build`).
    let kind = (libc::MAP_HUGETLB | libc::MAP_TYPE) as u64;
    for (mask, flags) in [
        (kind, libc::MAP_SHARED),
        (
            kind | libc::MAP_ANONYMOUS as u64,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
        ),
    ] {
        allowed.when(
            libc::SYS_mmap,
            &[
                (2, SeccompCmpOp::MaskedEq(libc::PROT_EXEC as u64), 0),
                (3, SeccompCmpOp::MaskedEq(mask), flags as u64),
            ],
        )?;
    }
    allowed.when(
        libc::SYS_mprotect,
        &[(2, SeccompCmpOp::MaskedEq(libc::PROT_EXEC as u64), 0)],
    )?;
    // Whether memory is offered to KSM is decided when the machine is built, by its owner's merge domain.
    allowed.when(
        libc::SYS_madvise,
        &[(2, SeccompCmpOp::Ne, libc::MADV_MERGEABLE as u64)],
    )?;
    allowed.one_of(libc::SYS_prctl, 0, &[libc::PR_SET_NAME])?;
    // A signal to a thread of this process: how a vCPU is called out of KVM_RUN, and abort().
    allowed.one_of(libc::SYS_tgkill, 0, &[own_pid()])?;
    // send() and recv() on what is already connected: no address, so no other destination.
    allowed.when(
        libc::SYS_sendto,
        &[(4, SeccompCmpOp::Eq, 0), (5, SeccompCmpOp::Eq, 0)],
    )?;
    allowed.when(
        libc::SYS_recvfrom,
        &[(4, SeccompCmpOp::Eq, 0), (5, SeccompCmpOp::Eq, 0)],
    )?;
    allowed.one_of(
        libc::SYS_fcntl,
        1,
        &[libc::F_GETFD, libc::F_SETFD, libc::F_GETFL, libc::F_SETFL],
    )
}

fn main(allowed: &mut Allowed) -> Result<(), Error> {
    allowed.always(&[
        libc::SYS_accept4,
        libc::SYS_recvmsg,
        libc::SYS_epoll_ctl,
        libc::SYS_fstat,
        libc::SYS_getsockname,
        libc::SYS_getsockopt,
        libc::SYS_eventfd2,
    ]);
    stat(allowed)?;
    allowed.ioctls(ioctls::DESCRIPTOR)
}

/// fstat(), which glibc 2.33 and later make newfstatat with an empty name, and Rust statx with one.
fn stat(allowed: &mut Allowed) -> Result<(), Error> {
    allowed.always(&[libc::SYS_fstat]);
    allowed.one_of(libc::SYS_statx, 2, &[libc::AT_EMPTY_PATH])?;
    allowed.one_of(libc::SYS_newfstatat, 3, &[libc::AT_EMPTY_PATH])
}

fn vcpu(allowed: &mut Allowed) -> Result<(), Error> {
    allowed.ioctls(&[ioctls::KVM_RUN])?;
    allowed.ioctls(ioctls::KVM_WIRING)?;
    allowed.ioctls(ioctls::KVM_VCPU)?;
    allowed.always(&[
        libc::SYS_writev,
        libc::SYS_eventfd2,
        libc::SYS_timerfd_settime,
    ]);
    Ok(())
}

fn block(allowed: &mut Allowed) -> Result<(), Error> {
    allowed.always(&[
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
        libc::SYS_epoll_create1,
        libc::SYS_epoll_ctl,
        libc::SYS_eventfd2,
    ]);
    stat(allowed)?;
    // IORING_REGISTER_FILES_UPDATE and _FILES_UPDATE2: which file stands in which place of the table.
    allowed.one_of(libc::SYS_io_uring_register, 1, &[6, 14])?;
    // The locks that QEMU takes on an image (F_OFD_SETLK, F_OFD_GETLK), never waiting for one.
    allowed.one_of(libc::SYS_fcntl, 1, &[libc::F_OFD_SETLK, libc::F_OFD_GETLK])?;
    allowed.ioctls(ioctls::BLOCK)
}

fn network(allowed: &mut Allowed) -> Result<(), Error> {
    allowed.always(&[
        libc::SYS_readv,
        libc::SYS_writev,
        libc::SYS_shutdown,
        libc::SYS_epoll_create1,
        libc::SYS_epoll_ctl,
        libc::SYS_eventfd2,
    ]);
    allowed.ioctls(ioctls::TAP)
}

fn crew(allowed: &mut Allowed) -> Result<(), Error> {
    allowed.always(&[
        libc::SYS_pread64,
        libc::SYS_pwrite64,
        libc::SYS_fdatasync,
        libc::SYS_sync_file_range,
        libc::SYS_ftruncate,
        libc::SYS_lseek,
    ]);
    stat(allowed)
}

fn migration(allowed: &mut Allowed) -> Result<(), Error> {
    allowed.always(&[
        // What it is that it was given.
        libc::SYS_getsockopt,
        libc::SYS_getpeername,
        // Where the memory of a file, and a disk, have holes.
        libc::SYS_lseek,
        // Disks that go along: an engine on plain system calls, which reads or writes them. Their locks are the control thread's.
        libc::SYS_eventfd2,
        libc::SYS_pread64,
        libc::SYS_preadv,
        libc::SYS_pwrite64,
        libc::SYS_pwritev,
        libc::SYS_fdatasync,
        libc::SYS_fallocate,
        libc::SYS_ftruncate,
    ]);
    // How long an image's file is, when it grows.
    stat(allowed)?;
    allowed.ioctls(ioctls::KVM_LOG)
}

fn own_pid() -> i32 {
    // SAFETY: getpid takes nothing and cannot fail.
    unsafe { libc::getpid() }
}

/// The machine as a whole: everything that the threads that do its work do, and its saved state.
fn control(allowed: &mut Allowed, profile: Profile) -> Result<(), Error> {
    vcpu(allowed)?;
    block(allowed)?;
    network(allowed)?;
    allowed.ioctls(ioctls::KVM_STATE)?;
    if profile == Profile::Vfio {
        allowed.ioctls(ioctls::VFIO)?;
    }
    Ok(())
}

/// What it takes to build a machine: a VM, its parts, its threads. Nobody has it once the machine is built.
fn build(allowed: &mut Allowed) -> Result<(), Error> {
    allowed.ioctls(ioctls::KVM_SYSTEM)?;
    allowed.ioctls(ioctls::KVM_CREATE)?;
    allowed.always(&[
        libc::SYS_epoll_create1,
        libc::SYS_timerfd_create,
        libc::SYS_timerfd_gettime,
        // Where the guest's memory is and that it stays there; RLIMIT_MEMLOCK is the broker's.
        libc::SYS_mbind,
        libc::SYS_mlock2,
        libc::SYS_madvise,
    ]);
    // An instant clone's memory is a saved machine's file, mapped privately. Nobody gains by it: what can be mapped
    // so can be read(), writing makes copies of the process's own, and nothing becomes executable. It is here and not in
    // `common` because such a mapping of the broker's memfd of huge pages would take further ones from the pool: once the
    // machine is built, and before its guest has run, no thread may do it any more.
    let kind = (libc::MAP_HUGETLB | libc::MAP_TYPE | libc::MAP_ANONYMOUS) as u64;
    allowed.when(
        libc::SYS_mmap,
        &[
            (2, SeccompCmpOp::MaskedEq(libc::PROT_EXEC as u64), 0),
            (3, SeccompCmpOp::MaskedEq(kind), libc::MAP_PRIVATE as u64),
        ],
    )?;
    allowed.one_of(
        libc::SYS_fcntl,
        1,
        &[libc::F_DUPFD_CLOEXEC, libc::F_GET_SEALS],
    )?;
    // pthread_create's flags and no others: threads, never processes, never new namespaces.
    let must = libc::CLONE_VM
        | libc::CLONE_FS
        | libc::CLONE_FILES
        | libc::CLONE_SIGHAND
        | libc::CLONE_THREAD
        | libc::CLONE_SYSVSEM;
    let may = libc::CLONE_SETTLS
        | libc::CLONE_PARENT_SETTID
        | libc::CLONE_CHILD_CLEARTID
        | libc::CLONE_CHILD_SETTID;
    let mask = u64::from(!may as u32);
    allowed.when(
        libc::SYS_clone,
        &[(0, SeccompCmpOp::MaskedEq(mask), u64::from(must as u32))],
    )?;
    // A thread may narrow itself: a plain filter, no flags (no TSYNC, no listener).
    allowed.one_of(libc::SYS_prctl, 0, &[libc::PR_SET_NO_NEW_PRIVS])?;
    allowed.when(
        libc::SYS_seccomp,
        &[
            (
                0,
                SeccompCmpOp::Eq,
                u64::from(libc::SECCOMP_SET_MODE_FILTER),
            ),
            (1, SeccompCmpOp::Eq, 0),
        ],
    )
}

/// What a thread in `role` may call in `profile`.
pub(crate) fn of_role(role: Role, profile: Profile) -> Result<Allowed, Error> {
    let mut allowed = Allowed::new();
    // KVM_RUN comes first in the chain of requests.
    match role {
        Role::Vcpu => vcpu(&mut allowed)?,
        Role::Control => control(&mut allowed, profile)?,
        Role::Main => main(&mut allowed)?,
        Role::Block => block(&mut allowed)?,
        Role::Network => {
            network(&mut allowed)?;
            // Its alone: not the control thread's, which does what all others do.
            allowed.ioctls(ioctls::VHOST)?;
        }
        Role::Memory => allowed.always(&[libc::SYS_epoll_create1, libc::SYS_epoll_ctl]),
        Role::Crew => crew(&mut allowed)?,
        Role::Migration => migration(&mut allowed)?,
    }
    runtime(&mut allowed)?;
    Ok(allowed)
}

/// What any thread of a worker may call: the union of the roles, and the building of a machine.
pub(crate) fn base(profile: Profile) -> Result<Allowed, Error> {
    let mut allowed = Allowed::new();
    control(&mut allowed, profile)?;
    allowed.ioctls(ioctls::VHOST)?;
    migration(&mut allowed)?;
    build(&mut allowed)?;
    main(&mut allowed)?;
    runtime(&mut allowed)?;
    Ok(allowed)
}

// SPDX-License-Identifier: Apache-2.0
//! The seccomp filters: which there are, and what a refused call meets.
//!
//! The kernel runs all filters of a thread and the severest answer wins (seccomp(2): KILL_PROCESS before
//! ERRNO before ALLOW; of two ERRNO the one installed last). So three small programs say three things:
//!
//! 1. *the list*: what `roles.rs` allows passes, everything else fails with EPERM. Not with death: a libc, a
//!    Python or an allocator of tomorrow probes for calls that did not exist when this was written, and
//!    opening a file (a traceback looking for its source) is a habit, not an attack. What they need is a
//!    clean refusal; the attacker gets nothing from it either.
//! 2. *the dead*: calls that no code of ours, of libc, of Python's runtime or of the core can reach even by
//!    mistake (execve, socket, ptrace, mount, setns, bpf, memfd_create, sendmsg, …). Whoever makes one has
//!    taken the process over; it ends at once (KILL_PROCESS), so that what follows in the exploit never runs, and
//!    the broker sees SIGSYS in the log.
//! 3. *the absent*: clone3 answers ENOSYS, so that libc falls back to clone, whose flags a filter can read
//!    (clone3's lie behind a pointer).
//!
//! The base filters go onto all threads at once (TSYNC). A role's filter goes onto the calling thread, on top; it
//! can only take away. The list is x86-64's: a call through another ABI kills (seccompiler checks the
//! architecture), one with the x32 bit is no number of the list.
//!
//! KVM_RUN is called a million times a second and its arguments are looked at, so the kernel's cache of calls
//! that always pass does not help it. Each program therefore begins with a short cut for it (`kvm_run_first`), in
//! front of seccompiler's chain of comparisons: a fifth of a microsecond a call.

use std::collections::BTreeMap;

use seccompiler::{sock_filter, BpfProgram, SeccompAction, SeccompFilter, SeccompRule, TargetArch};

use crate::ioctls;
use crate::roles::{base, of_role, Allowed, Role};
use crate::Error;

/// Which of the two fixed base filters a worker gets; chosen when it is started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Profile {
    /// Machines without passthrough.
    Plain,
    /// Machines with slots declared for passthrough: VFIO's requests too.
    Vfio,
}

/// Calls that only an attacker makes.
const DEAD: &[i64] = &[
    // other programs and processes
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_fork,
    libc::SYS_vfork,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_kcmp,
    libc::SYS_pidfd_open,
    libc::SYS_pidfd_getfd,
    libc::SYS_pidfd_send_signal,
    // sockets, and descriptors that would leave
    libc::SYS_socket,
    libc::SYS_socketpair,
    libc::SYS_connect,
    libc::SYS_bind,
    libc::SYS_listen,
    libc::SYS_sendmsg,
    libc::SYS_sendmmsg,
    // memory that the broker does not count, or that tricks the kernel
    libc::SYS_memfd_create,
    libc::SYS_memfd_secret,
    libc::SYS_userfaultfd,
    libc::SYS_shmget,
    libc::SYS_shmat,
    // the file system
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_open_tree,
    libc::SYS_move_mount,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    libc::SYS_name_to_handle_at,
    libc::SYS_open_by_handle_at,
    libc::SYS_quotactl,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_acct,
    // identity and namespaces
    libc::SYS_unshare,
    libc::SYS_setns,
    libc::SYS_setuid,
    libc::SYS_setgid,
    libc::SYS_setreuid,
    libc::SYS_setregid,
    libc::SYS_setresuid,
    libc::SYS_setresgid,
    libc::SYS_setgroups,
    libc::SYS_setfsuid,
    libc::SYS_setfsgid,
    libc::SYS_capset,
    libc::SYS_personality,
    // the kernel itself
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_io_uring_setup,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_reboot,
    libc::SYS_iopl,
    libc::SYS_ioperm,
    libc::SYS_modify_ldt,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_syslog,
    libc::SYS_fanotify_init,
];

/// Calls that the process is made to believe the kernel does not have.
const ABSENT: &[i64] = &[libc::SYS_clone3];

fn compile(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    otherwise: SeccompAction,
    matched: SeccompAction,
) -> Result<BpfProgram, Error> {
    let filter = SeccompFilter::new(rules, otherwise, matched, TargetArch::x86_64)?;
    Ok(filter.try_into()?)
}

/// Puts in front of `program`: ioctl(…, KVM_RUN) through x86-64's own ABI passes at once.
///
/// Jumps in a classic BPF program are relative, so `program` does not notice. Only for programs that let
/// KVM_RUN pass anyway, which the tests hold. Offsets are those of `struct seccomp_data` (linux/seccomp.h).
fn kvm_run_first(program: BpfProgram) -> BpfProgram {
    const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    const JUMP_IF: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
    const NR: u32 = 0;
    const ARCH: u32 = 4;
    const SECOND_ARGUMENT_LOW: u32 = 24;
    let step = |code, jf, k| sock_filter { code, jt: 0, jf, k };
    let mut all = vec![
        step(LOAD, 0, ARCH),
        step(JUMP_IF, 5, AUDIT_ARCH_X86_64),
        step(LOAD, 0, NR),
        step(JUMP_IF, 3, libc::SYS_ioctl as u32),
        step(LOAD, 0, SECOND_ARGUMENT_LOW),
        step(JUMP_IF, 1, ioctls::KVM_RUN),
        step(RETURN, 0, libc::SECCOMP_RET_ALLOW),
    ];
    all.extend(program);
    all
}

fn any_arguments(calls: &[i64]) -> BTreeMap<i64, Vec<SeccompRule>> {
    calls.iter().map(|call| (*call, Vec::new())).collect()
}

const REFUSED: SeccompAction = SeccompAction::Errno(libc::EPERM as u32);

/// A program that lets `allowed` pass, and the absent calls, which have their answer already.
fn list(allowed: Allowed) -> Result<BpfProgram, Error> {
    let mut rules = allowed.into_rules();
    rules.extend(any_arguments(ABSENT));
    compile(rules, REFUSED, SeccompAction::Allow)
}

/// The three programs of a profile, in the order in which they are installed: the list comes last, for it
/// refuses TSYNC.
fn base_programs(profile: Profile) -> Result<[BpfProgram; 3], Error> {
    let dead = compile(
        any_arguments(DEAD),
        SeccompAction::Allow,
        SeccompAction::KillProcess,
    )?;
    let absent = compile(
        any_arguments(ABSENT),
        SeccompAction::Allow,
        SeccompAction::Errno(libc::ENOSYS as u32),
    )?;
    Ok([dead, absent, list(base(profile)?)?].map(kvm_run_first))
}

/// Puts the base filter of `profile` on every thread of the process. Sets no_new_privs. Cannot be undone.
///
/// # Errors
/// A filter that does not compile or that the kernel refuses; some of the filters may then be in force.
pub fn close(profile: Profile) -> Result<(), Error> {
    for program in base_programs(profile)? {
        seccompiler::apply_filter_all_threads(&program).map_err(Error::Install)?;
    }
    Ok(())
}

/// Narrows the calling thread to `role`. Cannot be undone.
///
/// # Errors
/// As [`close`].
pub fn narrow(role: Role, profile: Profile) -> Result<(), Error> {
    let mut program = list(of_role(role, profile)?)?;
    if matches!(role, Role::Vcpu | Role::Control) {
        program = kvm_run_first(program);
    }
    seccompiler::apply_filter(&program).map_err(Error::Install)
}

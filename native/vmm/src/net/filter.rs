// SPDX-License-Identifier: Apache-2.0
//! Which frames a driver takes, as a program that the kernel runs on each of them before it queues it on a tap.
//!
//! The language is classic BPF (linux/filter.h, linux/bpf_common.h). A frame begins with the address that it is for;
//! what comes back is how many bytes of it to keep. It says exactly what [`Settings::takes`] says: not the tap's own
//! filter of addresses (TUNSETTXFILTER), which takes groups by a hash of 64 values.
//!
//! Bounds: two tables of 64 addresses are 657 instructions, of 4,096 that the kernel takes. What it has no memory for it
//! refuses, and receiving then stays here.

use libc::sock_filter;

use crate::virtio::net::{Settings, MAC};

const WORD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
const HALF: u32 = libc::BPF_LD | libc::BPF_H | libc::BPF_ABS;
const BYTE: u32 = libc::BPF_LD | libc::BPF_B | libc::BPF_ABS;
const EQUALS: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
const HAS: u32 = libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K;
const RETURN: u32 = libc::BPF_RET | libc::BPF_K;
/// All of a frame, however long.
const TAKE: sock_filter = step(RETURN, u32::MAX);
const DROP: sock_filter = step(RETURN, 0);

/// The program for what a driver has set.
pub(super) fn program(settings: &Settings) -> Vec<sock_filter> {
    let taken = settings.taken();
    if taken.everything {
        return vec![TAKE];
    }
    let mut program = Vec::new();
    // The first bit on the wire says that an address is a group's.
    for (sort, skip) in [(&taken.groups, (0, 1)), (&taken.hosts, (1, 0))] {
        match sort {
            None => program.extend([step(BYTE, 0), jump(HAS, 1, skip), TAKE]),
            Some(addresses) => program.extend(addresses.iter().flat_map(is)),
        }
    }
    program.push(DROP);
    program
}

/// Takes what is for this address.
fn is(address: &[u8; MAC]) -> [sock_filter; 5] {
    let [a, b, c, d, e, f] = *address;
    [
        step(WORD, 0),
        jump(EQUALS, u32::from_be_bytes([a, b, c, d]), (0, 3)),
        step(HALF, 4),
        jump(EQUALS, u32::from(u16::from_be_bytes([e, f])), (0, 1)),
        TAKE,
    ]
}

const fn step(code: u32, k: u32) -> sock_filter {
    jump(code, k, (0, 0))
}

/// `skip`: how many steps to leave out if so, and if not.
const fn jump(code: u32, k: u32, skip: (u8, u8)) -> sock_filter {
    sock_filter {
        code: code as u16,
        jt: skip.0,
        jf: skip.1,
        k,
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixDatagram;

    use super::*;

    /// Whether the kernel hands on a frame to this address, with the program on a socket.
    struct Kernel(UnixDatagram, UnixDatagram);

    impl Kernel {
        fn new(program: &[sock_filter]) -> Kernel {
            let (near, far) = UnixDatagram::pair().unwrap();
            far.set_nonblocking(true).unwrap();
            let program = libc::sock_fprog {
                len: program.len() as u16,
                filter: program.as_ptr().cast_mut(),
            };
            // SAFETY: the kernel reads the program, which outlives the call.
            let done = unsafe {
                libc::setsockopt(
                    far.as_raw_fd(),
                    libc::SOL_SOCKET,
                    libc::SO_ATTACH_FILTER,
                    std::ptr::from_ref(&program).cast(),
                    size_of_val(&program) as u32,
                )
            };
            assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
            Kernel(near, far)
        }

        fn takes(&self, address: [u8; MAC]) -> bool {
            let mut frame = [7; 60];
            frame[..MAC].copy_from_slice(&address);
            // One that is not taken is an error of the sender's here.
            let _ = self.0.send(&frame);
            let mut got = [0; 100];
            match self.1.recv(&mut got) {
                Ok(len) => {
                    assert_eq!(got[..len], frame);
                    true
                }
                Err(_) => false,
            }
        }
    }

    const OURS: [u8; MAC] = [0x52, 0x54, 0, 1, 2, 3];

    fn address(sort: u8, last: u8) -> [u8; MAC] {
        [sort, 0x54, 0, 1, last / 2, last]
    }

    fn table(hosts: u8, groups: u8) -> Vec<u8> {
        let mut command = vec![1, 0];
        for (sort, count) in [(0x52, hosts), (0x33, groups)] {
            command.extend_from_slice(&u32::from(count).to_le_bytes());
            command.extend((0..count).flat_map(|last| address(sort, last)));
        }
        command
    }

    #[test]
    fn the_kernel_takes_what_the_driver_takes_and_nothing_else() {
        let promiscuous = |on| vec![0, 0, on];
        let all_groups = |on| vec![0, 1, on];
        for commands in [
            vec![],
            vec![promiscuous(0)],
            vec![promiscuous(0), all_groups(1)],
            vec![promiscuous(0), table(3, 5)],
            vec![promiscuous(0), table(0, 64), all_groups(0)],
            vec![promiscuous(0), table(64, 64)],
            // Too many of a sort are all of it.
            vec![promiscuous(0), table(65, 2)],
            vec![promiscuous(0), table(2, 65)],
            vec![promiscuous(0), table(65, 65)],
            vec![promiscuous(0), vec![1, 1, 0x52, 0x54, 0, 1, 30, 61]],
            vec![table(1, 1), promiscuous(1)],
        ] {
            let mut settings = Settings::new(OURS, 1, u64::MAX);
            for command in &commands {
                settings.obey(command).unwrap();
            }
            let kernel = Kernel::new(&program(&settings));
            let some = (0..70).flat_map(|last| [address(0x52, last), address(0x33, last)]);
            for to in some.chain([OURS, [0xff; MAC], [0x52; MAC], [0x01; MAC], [0; MAC]]) {
                assert_eq!(
                    kernel.takes(to),
                    settings.takes(&to),
                    "{commands:?} {to:x?}"
                );
            }
        }
    }
}

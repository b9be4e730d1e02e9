// SPDX-License-Identifier: Apache-2.0
//! What each kind of memory is on the host, and what becomes of it.

use super::*;

#[test]
fn memory_beyond_two_gib_lies_above_the_hole() {
    assert_eq!(split(1 << 30), (1 << 30, 0));
    assert_eq!(split(3 << 30), (2 << 30, 1 << 30));
    let map = map(3 << 30);
    let last = map.last().unwrap();
    assert_eq!((last.base, last.size), (1 << 32, 1 << 30));
}

#[test]
fn a_file_that_is_too_short_is_refused() {
    let file = tempfile(1 << 20);
    let error = create(&Plan::of(MemoryKind::Shareable, 4 << 20), Some(file)).unwrap_err();
    assert_eq!(error.argument, "memory_fd");
}

#[test]
fn shareable_memory_is_the_file() {
    use std::os::unix::fs::FileExt;
    use vm_memory::Bytes;
    let file = tempfile(4 << 20);
    let other = File::from(file.try_clone().unwrap());
    let memory = create(&Plan::of(MemoryKind::Shareable, 4 << 20), Some(file)).unwrap();
    memory
        .write_obj(0x1234_u16, GuestAddress(0x20_0000))
        .unwrap();
    let mut seen = [0; 2];
    other.read_exact_at(&mut seen, 0x20_0000).unwrap();
    assert_eq!(seen, [0x34, 0x12]);
}

#[test]
fn what_is_discarded_reads_zero_and_is_the_hosts_again() {
    use vm_memory::Bytes;
    for (kind, file) in [
        (MemoryKind::Mergeable, None),
        (MemoryKind::Shareable, Some(tempfile(4 << 20))),
    ] {
        let memory = create(&Plan::of(kind, 4 << 20), file).unwrap();
        let fill = |from: u64| {
            memory
                .write_slice(&[7; 0x4000], GuestAddress(from))
                .unwrap()
        };
        fill(0x1000);
        // Parts of a page stay, and so does what lies beyond the end.
        assert_eq!(
            discard(&memory, 0x1800, 0x2000).unwrap(),
            0x1000,
            "{kind:?}"
        );
        let byte = |at| memory.read_obj::<u8>(GuestAddress(at)).unwrap();
        assert_eq!(
            [byte(0x1fff), byte(0x2000), byte(0x2fff), byte(0x3000)],
            [7, 0, 0, 7]
        );
        fill((4 << 20) - 0x4000);
        assert_eq!(
            discard(&memory, (4 << 20) - 0x1000, u64::MAX).unwrap(),
            0x1000
        );
        assert_eq!(discard(&memory, u64::MAX - 0x2000, 0x1000).unwrap(), 0);
        assert_eq!(discard(&memory, 4 << 20, 0x1000).unwrap(), 0);
        assert_eq!(byte((4 << 20) - 1), 0);
    }
}

/// The flags of the mapping at an address, as /proc/self/smaps has them.
fn flags(address: u64) -> Vec<String> {
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let mut inside = false;
    for line in smaps.lines() {
        if let Some((range, _)) = line.split_once(' ').filter(|(r, _)| r.contains('-')) {
            let (start, end) = range.split_once('-').unwrap();
            let number = |text| u64::from_str_radix(text, 16).unwrap();
            inside = (number(start)..number(end)).contains(&address);
        } else if let Some(flags) = line.strip_prefix("VmFlags: ").filter(|_| inside) {
            return flags.split(' ').map(str::to_owned).collect();
        }
    }
    panic!("no mapping at {address:#x}");
}

fn flags_of(plan: &Plan, file: Option<OwnedFd>) -> Vec<String> {
    let memory = create(plan, file).unwrap();
    flags(memory.get_host_address(GuestAddress(0)).unwrap() as u64)
}

#[test]
fn only_what_is_to_be_merged_is_offered_to_ksm_and_none_goes_to_children_or_dumps() {
    let ksm = std::path::Path::new("/sys/kernel/mm/ksm").exists();
    for (kind, merge, mergeable) in [
        (MemoryKind::Mergeable, true, ksm),
        (MemoryKind::Mergeable, false, false),
        (MemoryKind::Shareable, false, false),
    ] {
        let file = (kind == MemoryKind::Shareable).then(|| tempfile(4 << 20));
        let merge = Plan {
            merge,
            ..Plan::of(kind, 4 << 20)
        };
        let flags = flags_of(&merge, file);
        let has = |flag: &str| flags.iter().any(|f| f == flag);
        assert_eq!(has("mg"), mergeable, "{kind:?}: {flags:?}");
        assert!(has("dc") && has("dd"), "{kind:?}: {flags:?}");
    }
    let merged_process = std::fs::read_to_string("/proc/self/ksm_stat").unwrap_or_default();
    assert!(
        !merged_process.contains("ksm_merge_any: yes"),
        "never the whole process"
    );
}

#[test]
fn shareable_memory_asks_for_huge_pages() {
    let thp = std::path::Path::new("/sys/kernel/mm/transparent_hugepage/shmem_enabled").exists();
    let plan = Plan::of(MemoryKind::Shareable, 4 << 20);
    let flags = flags_of(&plan, Some(tempfile(4 << 20)));
    assert_eq!(flags.iter().any(|flag| flag == "hg"), thp, "{flags:?}");
}

#[test]
fn locked_memory_stays_and_beyond_the_limit_it_is_refused() {
    let plan = Plan {
        locked: true,
        ..Plan::of(MemoryKind::Mergeable, 4 << 20)
    };
    let flags = flags_of(&plan, None);
    assert!(flags.iter().any(|flag| flag == "lo"), "{flags:?}");
}

#[test]
fn memory_is_bound_to_nodes_that_there_are() {
    let plan = |nodes| Plan {
        nodes,
        ..Plan::of(MemoryKind::Mergeable, 4 << 20)
    };
    let memory = create(&plan(vec![0]), None).unwrap();
    let address = memory.get_host_address(GuestAddress(0)).unwrap() as usize;
    let maps = std::fs::read_to_string("/proc/self/numa_maps").unwrap_or_default();
    if let Some(line) = maps
        .lines()
        .find(|line| line.starts_with(&format!("{address:x} ")))
    {
        assert!(line.contains("bind:0"), "{line}");
    }
    let error = create(&plan(vec![1023]), None).unwrap_err();
    assert_eq!(error.argument, "memory_nodes");
}

fn tempfile(len: u64) -> OwnedFd {
    use std::os::fd::FromRawFd;
    // SAFETY: a fresh memfd, owned by nobody else.
    let file = unsafe { File::from_raw_fd(libc::memfd_create(c"memory".as_ptr(), 0)) };
    file.set_len(len).unwrap();
    file.into()
}

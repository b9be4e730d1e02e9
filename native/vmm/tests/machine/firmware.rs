// SPDX-License-Identifier: Apache-2.0
//! SeaBIOS as the distribution has it, and what it needs of the machine.
//!
//! Software KVM runs SeaBIOS to a boot sector of ours in a few seconds; GRUB and a system are for the nested host.

use std::io::Write;
use std::os::fd::IntoRawFd;
use std::path::{Path, PathBuf};

use serde_json::{json, Value};
use vmbus_vmm::{EndReason, Event, Kind, Request};

use crate::{build, fd, requires_kvm, run};

pub(crate) const SEABIOS: &str = "/usr/share/seabios/bios-256k.bin";

/// Ends the test where the distribution's SeaBIOS is not installed.
macro_rules! requires_seabios {
    () => {
        requires_kvm!();
        if !std::path::Path::new(SEABIOS).exists() {
            eprintln!("absent: {SEABIOS} (package seabios)");
            return;
        }
    };
}
pub(crate) use requires_seabios;

/// A directory that goes with the test.
pub(crate) struct Directory(pub PathBuf);

impl Directory {
    pub(crate) fn new(name: &str) -> Directory {
        let path = std::env::temp_dir().join(format!("vmbus-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Directory(path)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A disk whose boot sector writes `text` to the serial port and powers off, or waits if `wait`.
pub(crate) fn bootable(directory: &Path, text: &str, wait: bool) -> Value {
    let mut sector = vec![
        0xfa, // cli: SeaBIOS writes to the port from its timer
        0x31, 0xc0, 0x8e, 0xd8, // xor ax, ax; mov ds, ax
        0xbe, 0x1d, 0x7c, // mov si, text
        0xba, 0xf8, 0x03, // mov dx, 0x3f8
        0xac, 0x84, 0xc0, 0x74, 0x03, // next: lodsb; test al, al; jz end
        0xee, 0xeb, 0xf8, // out dx, al; jmp next
        0xba, 0x04, 0x06, 0xb8, 0x00, 0x20, // end: mov dx, 0x604; mov ax, 0x2000
        0xef, // out dx, ax
        0xf4, 0xeb, 0xfd, // halt: hlt; jmp halt
    ];
    if wait {
        sector[25] = 0x90; // nop
    }
    sector.extend(text.bytes());
    sector.resize(510, 0);
    sector.extend([0x55, 0xaa]);
    sector.resize(1 << 20, 0);
    let path = directory.join(text);
    std::fs::File::create(&path)
        .unwrap()
        .write_all(&sector)
        .unwrap();
    let disk = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    json!({ "id": text, "layers": [{ "fd": disk.into_raw_fd(), "format": "raw" }] })
}

/// A CD whose boot code is that of [`bootable`], by El Torito without emulation (version 1.0, figures 2 to 5).
fn bootable_cd(directory: &Path, text: &str) -> Value {
    let mut disk = bootable(directory, text, false);
    let path = directory.join(text);
    let code = std::fs::read(&path).unwrap()[..512].to_vec();
    let mut cd = vec![0; 64 * 2048];
    let mut put = |block: usize, offset: usize, bytes: &[u8]| {
        let at = block * 2048 + offset;
        cd[at..at + bytes.len()].copy_from_slice(bytes);
    };
    put(16, 0, b"\x01CD001\x01");
    put(17, 0, b"\0CD001\x01EL TORITO SPECIFICATION");
    put(17, 0x47, &20u32.to_le_bytes());
    put(20, 0, &[1, 0]);
    put(20, 30, &[0x55, 0xaa]);
    // Bootable, no emulation, one sector of 512 bytes from block 21.
    put(20, 32, &[0x88, 0, 0, 0, 0, 0, 1, 0, 21, 0, 0, 0]);
    put(21, 0, &code);
    std::fs::write(&path, &cd).unwrap();
    disk["cdrom"] = true.into();
    disk
}

fn firmware(path: impl AsRef<Path>, boot: &[&str]) -> Value {
    json!({ "code_fd": fd(path), "boot": boot })
}

#[test]
fn seabios_boots_the_disk_that_comes_first_in_the_order() {
    requires_seabios!();
    let directory = Directory::new("seabios-order");
    let disks = [
        bootable(&directory.0, "one", false),
        bootable(&directory.0, "two", false),
    ];
    let mut guest = run(
        "",
        json!({ "kernel": null, "disks": disks, "firmware": firmware(SEABIOS, &["disk/two", "disk/one"]) }),
    );
    let printed = guest.until("two");
    assert!(!printed.contains("one"), "{printed}");
    assert!(
        printed.contains("Machine UUID 11111111-2222-4333-8444-555555555555"),
        "{printed}"
    );
    assert_eq!(guest.end(), (EndReason::GuestPoweroff, String::new()));
}

#[test]
fn seabios_boots_disks_and_cds_of_the_scsi_host_adapter_in_the_order() {
    requires_seabios!();
    let directory = Directory::new("seabios-scsi");
    for (boot, wanted) in [
        (["disk/cd", "disk/disk"], "cd"),
        (["disk/disk", "disk/cd"], "disk"),
    ] {
        let mut disk = bootable(&directory.0, "disk", false);
        disk["bus"] = "scsi".into();
        let empty = json!({ "id": "empty", "layers": [], "cdrom": true });
        let disks = json!([empty, disk, bootable_cd(&directory.0, "cd")]);
        let firmware = firmware(SEABIOS, &boot);
        let mut guest = run(
            "",
            json!({ "kernel": null, "disks": disks, "firmware": firmware }),
        );
        let end = guest.end();
        assert_eq!(end, (EndReason::GuestPoweroff, String::new()));
        let printed = guest.drain();
        let last = printed.lines().last().unwrap_or_default();
        assert!(last.ends_with(wanted), "{boot:?}: {printed}");
    }
}

#[test]
fn seabios_shows_its_menu_on_the_serial_port_and_starts_again_after_a_reset_whatever_became_of_its_file(
) {
    requires_seabios!();
    let directory = Directory::new("seabios-menu");
    let copy = directory.0.join("bios.bin");
    std::fs::copy(SEABIOS, &copy).unwrap();
    let disk = bootable(&directory.0, "booted", true);
    let mut firmware = firmware(&copy, &["disk/booted"]);
    firmware["menu"] = true.into();
    let mut guest = run(
        "",
        json!({ "kernel": null, "disks": [disk], "firmware": firmware }),
    );
    std::fs::write(&copy, b"something else").unwrap();
    guest.until("Press ESC for boot menu");
    guest.send("\x1b");
    let menu = guest.until("1. Virtio disk");
    assert!(menu.contains("Select boot device"), "{menu}");
    guest.send("1");
    guest.until("booted");
    assert_eq!(guest.must(Request::Reset), [Event::Reset]);
    let begin = std::time::Instant::now();
    while guest.drain().matches("SeaBIOS (version").count() < 2 {
        assert!(begin.elapsed() < crate::PATIENCE, "it did not start again");
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    guest.must(Request::Stop);
}

/// iPXE itself is for the nested host: on a software KVM it dies, after it has begun.
#[test]
fn seabios_runs_the_option_rom_of_a_network_interface_that_comes_first() {
    requires_seabios!();
    const ROM: &str = "/usr/lib/ipxe/qemu/efi-virtio.rom";
    if !Path::new(ROM).exists() {
        eprintln!("absent: {ROM} (package ipxe-qemu)");
        return;
    }
    let Some(tap) = crate::network::tap(1) else {
        return;
    };
    let mut firmware = firmware(SEABIOS, &["nic/lan"]);
    firmware["nic_rom_fd"] = fd(ROM).into();
    let nics = json!([{ "id": "lan", "mac": "52:54:00:12:34:56", "tap_fds": tap }]);
    let mut guest = run(
        "",
        json!({ "kernel": null, "nics": nics, "firmware": firmware }),
    );
    let printed = guest.until("Booting from ROM");
    assert!(
        printed.contains("iPXE (http://ipxe.org) 00:03.0"),
        "{printed}"
    );
    guest.must(Request::Stop);
}

#[test]
fn firmware_of_no_size_that_firmware_has_is_refused() {
    requires_kvm!();
    let directory = Directory::new("firmware-sizes");
    let path = directory.0.join("code");
    for size in [
        0,
        1000,
        (128 << 10) - 4096,
        (128 << 10) + 1,
        (8 << 20) + 4096,
    ] {
        std::fs::write(&path, vec![0u8; size]).unwrap();
        let error = build(
            "",
            json!({ "kernel": null, "firmware": firmware(&path, &[]) }),
        );
        let error = error.err().unwrap();
        assert_eq!(
            (error.kind, error.argument.as_str()),
            (Kind::ImageInvalid, "firmware"),
            "{size}"
        );
    }
    std::fs::write(&path, vec![0u8; 128 << 10]).unwrap();
    let change = json!({ "kernel": null, "firmware": firmware(&path, &["disk/none"]) });
    let error = build("", change).err().unwrap();
    assert_eq!(error.argument, "firmware.boot");
}

#[test]
fn firmware_that_is_nothing_ends_the_machine_and_nothing_else() {
    requires_kvm!();
    let directory = Directory::new("firmware-zeroes");
    let path = directory.0.join("code");
    // A halt with interrupts off at the reset vector would wait for ever: power off instead.
    let mut code = vec![0xf4u8; 128 << 10];
    let at = (128 << 10) - 16;
    code[at..at + 8].copy_from_slice(&[0xba, 0x04, 0x06, 0xb8, 0x00, 0x20, 0xef, 0xf4]);
    std::fs::write(&path, &code).unwrap();
    let guest = run(
        "",
        json!({ "kernel": null, "firmware": firmware(&path, &[]) }),
    );
    assert_eq!(guest.end().0, EndReason::GuestPoweroff);
}

#[test]
fn the_shadow_area_is_ram_read_only_ram_or_nothing() {
    requires_kvm!();
    let mut guest = run("shadow", json!({}));
    let printed = guest.until("shadow: done");
    for line in [
        "read-only: 11111111",
        "nothing: ffffffff",
        "back: 11111111, written: 55555555, neighbour: 44444444",
    ] {
        assert!(printed.contains(line), "{line} is missing in {printed}");
    }
    assert!(!printed.contains("lost"), "{printed}");
}

#[test]
fn a_kernel_that_panics_says_so() {
    requires_kvm!();
    let mut guest = run("panic", json!({}));
    guest.until("panic: understood 3");
    assert_eq!(guest.end(), (EndReason::GuestPanic, String::new()));
}

#[test]
fn a_kernel_that_is_booted_directly_finds_the_configuration_device() {
    requires_kvm!();
    let mut guest = run("fw-cfg", json!({}));
    let printed = guest.until("bootorder 5");
    for line in [
        "QEMU: ",
        "etc/e820 20",
        "etc/acpi/rsdp 36",
        "etc/smbios/smbios-anchor 24",
        "etc/sercon-port 8",
        "etc/vmgenid_guid 4096",
    ] {
        assert!(printed.contains(line), "{line} is missing in {printed}");
    }
}

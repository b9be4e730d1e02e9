// SPDX-License-Identifier: Apache-2.0
//! The fds that a configuration names, taken over: from here on each is closed exactly once, by who owns it.
//!
//! Either all of them are taken over or, where a number is no fd or stands there twice, none. That a number is that of an
//! open file is the caller's word: this is where the contract of `Machine::build` is relied upon.

use std::collections::BTreeSet;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use super::devices::{Disk, Nic};
use super::machine::Config;
use crate::disks::LayerFds;
use crate::error::{Error, Result};

/// The files of a machine, owned.
pub struct Files {
    /// `/dev/kvm`.
    pub kvm: OwnedFd,
    /// The console's socket.
    pub console: OwnedFd,
    /// The memory's file.
    pub memory: Option<OwnedFd>,
    /// The kernel.
    pub kernel: Option<OwnedFd>,
    /// The firmware's code.
    pub firmware: Option<OwnedFd>,
    /// Its variables.
    pub variables: Option<OwnedFd>,
    /// The option ROM of network interfaces.
    pub nic_rom: Option<OwnedFd>,
    /// The initrd.
    pub initrd: Option<OwnedFd>,
    /// For each disk, for each layer: the image and its data file.
    pub disks: Vec<Vec<LayerFds>>,
    /// For each NIC: the descriptors of its link.
    pub nics: Vec<Vec<OwnedFd>>,
    /// For each port: its socket.
    pub ports: Vec<OwnedFd>,
    /// The saved machine that it is a clone of.
    pub clone: Option<OwnedFd>,
}

impl Config {
    /// Takes over every fd that the configuration names.
    ///
    /// # Errors
    /// `InvalidArgument` for a number that is no fd, or that stands there twice (then none is taken over).
    pub fn take_files(&self) -> Result<Files> {
        each_stands_once(self.fds())?;
        Ok(Files {
            kvm: own(self.kvm_fd),
            console: own(self.console_fd),
            memory: self.memory_fd.map(own),
            kernel: self.kernel.as_ref().map(|kernel| own(kernel.fd)),
            firmware: self.firmware.as_ref().map(|code| own(code.code_fd)),
            variables: self.firmware.as_ref().and_then(|f| f.variables_fd).map(own),
            nic_rom: self.firmware.as_ref().and_then(|f| f.nic_rom_fd).map(own),
            initrd: self.kernel.as_ref().and_then(|k| k.initrd_fd).map(own),
            disks: self.disks.iter().map(Disk::own_files).collect(),
            nics: self.nics.iter().map(Nic::own_files).collect(),
            ports: self.ports.iter().map(|port| own(port.fd)).collect(),
            clone: self.clone_fd.map(own),
        })
    }

    fn fds(&self) -> Vec<(String, RawFd)> {
        let mut fds = vec![
            ("kvm_fd".to_owned(), self.kvm_fd),
            ("console_fd".to_owned(), self.console_fd),
        ];
        fds.extend(self.memory_fd.map(|fd| ("memory_fd".to_owned(), fd)));
        fds.extend(self.clone_fd.map(|fd| ("clone_fd".to_owned(), fd)));
        if let Some(kernel) = &self.kernel {
            fds.push(("kernel.fd".to_owned(), kernel.fd));
            let initrd = kernel.initrd_fd;
            fds.extend(initrd.map(|fd| ("kernel.initrd_fd".to_owned(), fd)));
        }
        if let Some(firmware) = &self.firmware {
            fds.push(("firmware.code_fd".to_owned(), firmware.code_fd));
            for (name, fd) in [
                ("firmware.variables_fd", firmware.variables_fd),
                ("firmware.nic_rom_fd", firmware.nic_rom_fd),
            ] {
                fds.extend(fd.map(|fd| (name.to_owned(), fd)));
            }
        }
        for (index, disk) in self.disks.iter().enumerate() {
            fds.extend(disk.fds(&format!("disks[{index}].")));
        }
        for (index, port) in self.ports.iter().enumerate() {
            fds.push((format!("ports[{index}].fd"), port.fd));
        }
        for (index, nic) in self.nics.iter().enumerate() {
            fds.extend(nic.fds(&format!("nics[{index}].")));
        }
        fds
    }
}

impl Disk {
    /// Takes over every fd that the disk names, as [`Config::take_files`] does: for each layer, the image and its
    /// data file.
    ///
    /// # Errors
    /// As there.
    pub fn take_files(&self) -> Result<Vec<LayerFds>> {
        each_stands_once(self.fds(""))?;
        Ok(self.own_files())
    }

    fn own_files(&self) -> Vec<LayerFds> {
        let layers = self.layers.iter();
        layers
            .map(|layer| LayerFds {
                image: own(layer.fd),
                data: layer.data_fd.map(own),
                secret: layer.secret_fd.map(own),
            })
            .collect()
    }

    fn fds(&self, prefix: &str) -> Vec<(String, RawFd)> {
        let mut fds = Vec::new();
        for (index, layer) in self.layers.iter().enumerate() {
            fds.push((format!("{prefix}layers[{index}].fd"), layer.fd));
            let data = layer.data_fd;
            fds.extend(data.map(|fd| (format!("{prefix}layers[{index}].data_fd"), fd)));
            let secret = layer.secret_fd;
            fds.extend(secret.map(|fd| (format!("{prefix}layers[{index}].secret_fd"), fd)));
        }
        fds
    }
}

impl Nic {
    /// Takes over the queues of the tap, as [`Config::take_files`] does.
    ///
    /// # Errors
    /// As there.
    pub fn take_files(&self) -> Result<Vec<OwnedFd>> {
        each_stands_once(self.fds(""))?;
        Ok(self.own_files())
    }

    fn own_files(&self) -> Vec<OwnedFd> {
        let all = self.tap_fds.iter().chain(&self.vhost_fds);
        all.map(|fd| own(*fd)).collect()
    }

    fn fds(&self, prefix: &str) -> Vec<(String, RawFd)> {
        let mut fds = Vec::new();
        for (name, numbers) in [("tap_fds", &self.tap_fds), ("vhost_fds", &self.vhost_fds)] {
            let named = |(index, fd): (usize, &RawFd)| (format!("{prefix}{name}[{index}]"), *fd);
            fds.extend(numbers.iter().enumerate().map(named));
        }
        fds
    }
}

/// Takes over the one fd of a request.
///
/// # Errors
/// `InvalidArgument` for a number that is no fd.
pub(super) fn take(argument: &str, fd: RawFd) -> Result<OwnedFd> {
    if fd < 0 {
        return Err(Error::invalid(argument, "is not an fd"));
    }
    Ok(own(fd))
}

fn each_stands_once(fds: Vec<(String, RawFd)>) -> Result<()> {
    let mut seen = BTreeSet::new();
    for (argument, fd) in fds {
        if fd < 0 || !seen.insert(fd) {
            let message = format!("fd {fd} is not an fd of its own");
            return Err(Error::invalid(argument, message));
        }
    }
    Ok(())
}

fn own(fd: RawFd) -> OwnedFd {
    // SAFETY: the contract of `Machine::build` gives us the fds that the configuration names, and
    // `take_files` has checked that each stands there once, so nobody else closes it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

// SPDX-License-Identifier: Apache-2.0
//! What a machine must be to go on from a file: the same type, processor, memory and devices, on the same disks.
//!
//! Where a device sits, and what else of it a guest can see, its state knows; here is what stands for what lies behind
//! it, and what makes the better sentence when it differs.

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::cpu::model;
use crate::error::{Error, Kind, Result};
use crate::state::State;

/// An answer to CPUID: leaf, subleaf, EAX to EDX.
pub type Answer = (u32, u32, [u32; 4]);

/// What a machine is, as far as it is built.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hardware {
    /// The version of what the guest sees.
    pub machine_type: String,
    /// The name of the CPU model.
    pub cpu_model: String,
    /// What the first vCPU answers to CPUID.
    pub cpuid: Vec<Answer>,
    /// How many vCPUs there are.
    pub vcpus: u8,
    /// Bytes of RAM.
    pub memory: u64,
    /// Whether it booted by firmware, or a kernel was entered directly.
    pub firmware: bool,
}

/// A saved machine's facts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Facts {
    /// What it is.
    pub hardware: Hardware,
    /// The machine that was saved.
    pub uuid: String,
    /// What each device is to the rest of the machine, and what lies behind it, by its id.
    pub devices: BTreeMap<String, Device>,
    /// Nanoseconds since 1970, UTC, by the host that saved it.
    pub saved_at: u64,
    /// The version of vmbus that did.
    pub version: String,
}

/// A device's part.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Device {
    /// What must be the same, always.
    pub same: State,
    /// The files behind it; empty if that does not matter.
    #[serde(default)]
    pub files: Vec<FileStamp>,
}

impl Device {
    /// Bytes of a disk.
    pub fn size(&self) -> Option<u64> {
        self.same.get("size")?.as_u64()
    }

    /// Whether it is a disk that the guest may write.
    fn is_writable(&self) -> bool {
        let says = |name: &str| self.same.get(name).and_then(serde_json::Value::as_bool);
        says("read-only") == Some(false) && says("cdrom") != Some(true)
    }

    fn without_size(&self) -> State {
        let mut same = self.same.clone();
        if let Some(same) = same.as_object_mut() {
            same.remove("size");
        }
        same
    }
}

/// Which disks a machine may go on with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disks {
    /// The same files, which nobody has written to since.
    Same,
    /// Any of the same size.
    Any,
    /// Those that will be what they were then.
    GoingBack,
}

/// By what a file is known again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileStamp {
    /// The device it is on and its number there; of a block device, its own number and 0.
    pub identity: (u64, u64),
    /// Bytes.
    pub len: u64,
    /// When it was last written, in nanoseconds since 1970; 0 for a block device, which does not tell.
    pub modified: i128,
}

/// Nanoseconds since 1970, UTC.
pub fn now() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |now| u64::try_from(now.as_nanos()).unwrap_or(u64::MAX))
}

impl Facts {
    /// Whether the machine `own` can go on from here, on such disks.
    ///
    /// # Errors
    /// `NotSupported` for another processor; `InvalidArgument` for another machine; `Changed` for disks.
    pub fn check(&self, own: &Facts, disks: Disks) -> Result<()> {
        let (saved, built) = (&self.hardware, &own.hardware);
        let differs =
            |argument: &str, saved: &dyn std::fmt::Display, built: &dyn std::fmt::Display| {
                let message =
                    format!("the machine that is to go on has {saved}, and this one has {built}");
                Err(Error::invalid(argument, message))
            };
        if saved.machine_type != built.machine_type {
            return differs("machine_type", &saved.machine_type, &built.machine_type);
        }
        if saved.cpu_model != built.cpu_model {
            return differs("cpu_model", &saved.cpu_model, &built.cpu_model);
        }
        if saved.vcpus != built.vcpus {
            return differs("vcpus", &saved.vcpus, &built.vcpus);
        }
        if saved.memory != built.memory {
            return differs("memory", &saved.memory, &built.memory);
        }
        if saved.firmware != built.firmware {
            let word = |firmware| if firmware { "firmware" } else { "a kernel" };
            return differs("firmware", &word(saved.firmware), &word(built.firmware));
        }
        if saved.cpuid != built.cpuid {
            let mut answers = saved.cpuid.iter().zip(&built.cpuid);
            let first = answers.find(|(saved, built)| saved != built);
            let leaf = first.map_or(0, |((leaf, _, _), _)| *leaf);
            let host = if saved.cpu_model == model::HOST {
                "; a machine with the model host goes on only where it was"
            } else {
                ""
            };
            let message = format!("CPUID leaf {leaf:#x} answers otherwise here{host}");
            return Err(Error::new(Kind::NotSupported, "cpu_model", message));
        }
        if let Some(id) = self
            .devices
            .keys()
            .find(|id| !own.devices.contains_key(*id))
        {
            let message = format!("the machine that is to go on has {id}, which this one lacks");
            return Err(Error::invalid(id, message));
        }
        for (id, built) in &own.devices {
            let Some(saved) = self.devices.get(id) else {
                let message = format!("the machine that is to go on has no {id}");
                return Err(Error::invalid(id, message));
            };
            let same = match disks {
                Disks::GoingBack => saved.without_size() == built.without_size(),
                Disks::Same | Disks::Any => saved.same == built.same,
            };
            if !same {
                return differs(id, &saved.same, &built.same);
            }
            if disks == Disks::Same && saved.files != built.files {
                let message = "is another file, or was written to since the machine was saved";
                return Err(Error::new(Kind::Changed, id, message));
            }
        }
        Ok(())
    }

    /// The same with those of its disks that have `grown` as large as those of `own` are, where these are larger: as if they
    /// had grown before.
    #[must_use]
    pub fn with_grown(mut self, own: &Facts, grown: impl Fn(&str) -> bool) -> Facts {
        for (id, device) in self.devices.iter_mut().filter(|(id, _)| grown(id)) {
            let here = own.devices.get(id).and_then(Device::size);
            let larger = here.filter(|here| device.size().is_some_and(|size| size < *here));
            if let (Some(size), Some(same)) = (larger, device.same.as_object_mut()) {
                same.insert("size".to_owned(), size.into());
            }
        }
        self
    }

    /// Whether what the guest of `self` writes to its disks is written to those of `own`: whether they are the same files. Of some
    /// (`right`) it need not be so.
    ///
    /// Two hosts agree on the number that a shared file has on its file system, and not on the file system's own. So another number
    /// is another file, and the same number may be the same; of block devices nothing is known.
    ///
    /// # Errors
    /// `InvalidArgument` for one that is another file.
    pub fn check_shared(&self, own: &Facts, right: impl Fn(&str) -> bool) -> Result<()> {
        for (id, built) in own.devices.iter().filter(|(id, _)| !right(id)) {
            let number = |device: &Device| {
                let file = device.files.first().map_or(0, |file| file.identity.1);
                (file != 0 && device.is_writable()).then_some(file)
            };
            let here = number(built);
            let there = self.devices.get(id).and_then(number);
            if here.zip(there).is_some_and(|(here, there)| here != there) {
                let message = "its file is another one than the source's, and would lack what the guest writes: \
                               copy the disk, or say that the file holds it by other means (separate)";
                return Err(Error::invalid(id, message));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts() -> Facts {
        let disk = Device {
            same: serde_json::json!({ "size": 4096 }),
            files: vec![FileStamp {
                identity: (1, 2),
                len: 4096,
                modified: 5,
            }],
        };
        Facts {
            hardware: Hardware {
                machine_type: "vmbus-1".to_owned(),
                cpu_model: "host".to_owned(),
                cpuid: vec![(1, 0, [1, 2, 3, 4])],
                vcpus: 2,
                memory: 64 << 20,
                firmware: false,
            },
            uuid: String::new(),
            devices: [("disk/root".to_owned(), disk)].into(),
            saved_at: 7,
            version: String::new(),
        }
    }

    #[test]
    fn another_machine_is_told_by_what_differs() {
        let saved = facts();
        saved.check(&facts(), Disks::Same).unwrap();
        let refused = |change: &dyn Fn(&mut Facts)| {
            let mut own = facts();
            change(&mut own);
            let error = saved.check(&own, Disks::Same).unwrap_err();
            (error.kind, error.argument)
        };
        let invalid = |argument: &str| (Kind::InvalidArgument, argument.to_owned());
        assert_eq!(refused(&|f| f.hardware.vcpus = 1), invalid("vcpus"));
        assert_eq!(refused(&|f| f.hardware.memory = 0), invalid("memory"));
        assert_eq!(
            refused(&|f| f.hardware.firmware = true),
            invalid("firmware")
        );
        assert_eq!(refused(&|f| f.devices.clear()), invalid("disk/root"));
        assert_eq!(
            refused(&|f| f.hardware.cpuid[0].2[0] = 9),
            (Kind::NotSupported, "cpu_model".to_owned())
        );
        assert_eq!(
            refused(&|f| f.hardware.machine_type = "vmbus-2".to_owned()),
            invalid("machine_type")
        );
        // What a type shows a guest is the same whichever version shows it.
        let mut newer = facts();
        newer.version = "another".to_owned();
        saved.check(&newer, Disks::Same).unwrap();
        let extra = |f: &mut Facts| {
            f.devices.insert("nic/lan".to_owned(), Device::default());
        };
        assert_eq!(refused(&extra), invalid("nic/lan"));
    }

    #[test]
    fn a_disk_that_was_written_is_refused_unless_that_is_meant() {
        let mut own = facts();
        own.devices.get_mut("disk/root").unwrap().files[0].modified = 6;
        let error = facts().check(&own, Disks::Same).unwrap_err();
        assert_eq!(error.kind, Kind::Changed);
        facts().check(&own, Disks::Any).unwrap();
    }

    #[test]
    fn a_disk_may_be_larger_where_it_is_said_to_have_grown_and_never_smaller() {
        let of = |size: u64| {
            let mut facts = facts();
            facts.devices.get_mut("disk/root").unwrap().same = serde_json::json!({ "size": size });
            facts
        };
        let (small, large) = (of(4096), of(8192));
        let grown = |facts: &Facts, own: &Facts, has| {
            let facts = facts.clone().with_grown(own, |id| has && id == "disk/root");
            facts.check(own, Disks::Any)
        };
        grown(&small, &large, true).unwrap();
        grown(&small, &small, true).unwrap();
        grown(&small, &large, false).unwrap_err();
        grown(&large, &small, true).unwrap_err();
    }

    #[test]
    fn a_disk_that_is_written_is_shared_copied_or_answered_for() {
        let with = |read_only: bool, file: (u64, u64)| {
            let mut facts = facts();
            let disk = facts.devices.get_mut("disk/root").unwrap();
            disk.same = serde_json::json!({ "read-only": read_only });
            disk.files[0].identity = file;
            facts
        };
        let source = with(false, (1, 2));
        let nobody = |_: &str| false;
        source.check_shared(&source, nobody).unwrap();
        // The file system has another number on another host.
        source.check_shared(&with(false, (9, 2)), nobody).unwrap();
        let other = with(false, (1, 3));
        let error = source.check_shared(&other, nobody).unwrap_err();
        assert_eq!(
            (error.kind, error.argument.as_str()),
            (Kind::InvalidArgument, "disk/root")
        );
        source.check_shared(&other, |id| id == "disk/root").unwrap();
        // Block devices have numbers of each host's own.
        let block = with(false, (7, 0));
        block.check_shared(&with(false, (8, 0)), nobody).unwrap();
        let medium = with(true, (1, 2));
        medium.check_shared(&with(true, (1, 3)), nobody).unwrap();
    }

    #[test]
    fn a_disk_of_another_size_is_refused_unless_it_goes_back_to_its_own() {
        let mut own = facts();
        own.devices.get_mut("disk/root").unwrap().same = serde_json::json!({ "size": 8192 });
        for disks in [Disks::Same, Disks::Any] {
            let error = facts().check(&own, disks).unwrap_err();
            assert_eq!(error.kind, Kind::InvalidArgument);
        }
        facts().check(&own, Disks::GoingBack).unwrap();
    }
}

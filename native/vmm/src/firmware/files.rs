// SPDX-License-Identifier: Apache-2.0
//! What the firmware configuration device has: numbered items and named files.
//!
//! | item | what |
//! |---|---|
//! | 0x00, 0x01 | signature, version |
//! | 0x02, 0x03 | UUID, bytes of memory below 4 GiB |
//! | 0x04 | there is no screen |
//! | 0x05, 0x0f | vCPUs present, and how many APIC IDs there are |
//! | 0x0e | whether SeaBIOS offers its boot menu |
//! | 0x19 | the directory of the files |
//! | 0x20… | the files |
//!
//! | file | what |
//! |---|---|
//! | etc/e820 | RAM, as (address, bytes, 1) |
//! | etc/acpi/rsdp, etc/acpi/tables, etc/table-loader | see [`super::loader`] |
//! | etc/vmgenid_guid, etc/vmgenid_addr | the page of the generation ID; where firmware has put it |
//! | etc/smbios/smbios-anchor, etc/smbios/smbios-tables | see [`super::smbios`] |
//! | etc/sercon-port | the serial port that is SeaBIOS's console |
//! | bootorder | what is booted, one device path a line; then nothing |
//!
//! Source of numbers and names: QEMU's docs/specs/fw_cfg and hw/i386/fw_cfg.c; SeaBIOS's docs/Runtime_config.md.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::state::{self, Bytes};

/// The directory of the files.
pub const DIRECTORY: u16 = 0x19;
const FILES: u16 = 0x20;
const NAME: usize = 56;
/// Version 1, and transfers.
const VERSION: u32 = 3;

/// The bytes of an item.
pub struct Content(pub Vec<u8>);

/// Makes the files of a group, in their order.
pub type Make = Box<dyn Fn() -> Vec<Vec<u8>> + Send + Sync>;

/// Files that are made together when one of them is first selected.
struct Group {
    first: u16,
    count: u16,
    make: Make,
    made: bool,
}

/// All items.
pub struct Files {
    items: BTreeMap<u16, Content>,
    names: Vec<String>,
    writable: Vec<u16>,
    groups: Vec<Group>,
}

/// What the items remember: which groups were made, with what came of it, and what was written.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Saved {
    made: Vec<bool>,
    content: BTreeMap<u16, Bytes>,
}

impl Files {
    /// What they remember.
    pub fn saved(&self) -> Saved {
        let made = self.groups.iter().filter(|group| group.made);
        let keys = made.flat_map(|group| group.first..group.first.saturating_add(group.count));
        let keys = keys.chain(self.writable.iter().copied());
        Saved {
            made: self.groups.iter().map(|group| group.made).collect(),
            content: keys
                .filter_map(|key| Some((key, Bytes(self.items.get(&key)?.0.clone()))))
                .collect(),
        }
    }

    /// Takes over what others like these remembered.
    ///
    /// # Errors
    /// `ImageInvalid` for other items, or of other sizes.
    pub fn take(&mut self, saved: Saved) -> Result<()> {
        if saved.made.len() != self.groups.len() {
            return Err(state::invalid("other files of firmware"));
        }
        for (key, bytes) in saved.content {
            let item = self.items.get_mut(&key);
            let item = item.filter(|item| item.0.len() == bytes.0.len() && key >= FILES);
            let item = item.ok_or_else(|| state::invalid(format!("item {key:#x} is another")))?;
            item.0 = bytes.0;
        }
        for (group, made) in self.groups.iter_mut().zip(saved.made) {
            group.made = made;
        }
        Ok(())
    }

    /// The items by which firmware knows the device.
    pub fn new() -> Files {
        let mut files = Files {
            items: BTreeMap::new(),
            names: Vec::new(),
            writable: Vec::new(),
            groups: Vec::new(),
        };
        files.set(0x00, b"QEMU".to_vec());
        files.set(0x01, VERSION.to_le_bytes().to_vec());
        files.list();
        files
    }

    /// Sets a numbered item.
    pub fn set(&mut self, key: u16, bytes: Vec<u8>) {
        self.items.insert(key, Content(bytes));
    }

    /// Adds a file.
    pub fn add(&mut self, name: &str, bytes: Vec<u8>) {
        let key = FILES.saturating_add(self.names.len() as u16);
        self.set(key, bytes);
        self.names.push(name.to_owned());
        self.list();
    }

    /// Adds a file of zeroes that firmware may write.
    pub fn add_writable(&mut self, name: &str, size: usize) {
        self.writable
            .push(FILES.saturating_add(self.names.len() as u16));
        self.add(name, vec![0; size]);
    }

    /// Adds files of these sizes that `make` makes when one of them is selected. One that comes out longer or shorter is cut
    /// or filled with zeroes: firmware has seen the size.
    pub fn add_prepared(&mut self, files: Vec<(&str, usize)>, make: Make) {
        self.groups.push(Group {
            first: FILES.saturating_add(self.names.len() as u16),
            count: files.len() as u16,
            make,
            made: false,
        });
        for (name, size) in files {
            self.add(name, vec![0; size]);
        }
    }

    /// An item's bytes.
    pub fn item(&self, key: u16) -> Option<&Content> {
        self.items.get(&key)
    }

    /// An item that firmware may write.
    pub fn writable(&mut self, key: u16) -> Option<&mut Vec<u8>> {
        let may = self.writable.contains(&key);
        self.items
            .get_mut(&key)
            .filter(|_| may)
            .map(|content| &mut content.0)
    }

    /// What a file holds that firmware may write.
    pub fn written(&self, name: &str) -> Option<Vec<u8>> {
        let index = self.names.iter().position(|known| known == name)?;
        let key = FILES.checked_add(index as u16)?;
        self.items.get(&key).map(|content| content.0.clone())
    }

    /// `key` is selected: what is made late is made now.
    pub fn prepare(&mut self, key: u16) {
        for group in &mut self.groups {
            let index = key.checked_sub(group.first);
            if group.made || index.is_none_or(|index| index >= group.count) {
                continue;
            }
            group.made = true;
            for (key, mut bytes) in (group.first..).zip((group.make)()) {
                if let Some(content) = self.items.get_mut(&key) {
                    bytes.resize(content.0.len(), 0);
                    content.0 = bytes;
                }
            }
        }
    }

    /// All that is made late is made now.
    pub fn prepare_all(&mut self) {
        let firsts: Vec<u16> = self.groups.iter().map(|group| group.first).collect();
        firsts.into_iter().for_each(|key| self.prepare(key));
    }

    /// Nothing is made, nothing is written.
    pub fn reset(&mut self) {
        for group in &mut self.groups {
            group.made = false;
        }
        for key in &self.writable {
            if let Some(content) = self.items.get_mut(key) {
                content.0.fill(0);
            }
        }
    }

    /// The files' names and contents, for whoever compares machines; those made late as they are now.
    pub fn named(&self) -> impl Iterator<Item = (&str, &[u8])> {
        self.names.iter().zip(FILES..).filter_map(|(name, key)| {
            let content = self.items.get(&key)?;
            Some((name.as_str(), content.0.as_slice()))
        })
    }

    /// All items by their numbers.
    pub fn numbered(&self) -> impl Iterator<Item = (u16, &[u8])> {
        let items = self.items.iter();
        items.map(|(key, content)| (*key, content.0.as_slice()))
    }

    fn list(&mut self) {
        let mut directory = (self.names.len() as u32).to_be_bytes().to_vec();
        for (name, key) in self.names.iter().zip(FILES..) {
            let size = self.items.get(&key).map_or(0, |content| content.0.len());
            directory.extend((size as u32).to_be_bytes());
            directory.extend(key.to_be_bytes());
            directory.extend([0; 2]);
            let mut field = name.clone().into_bytes();
            field.resize(NAME, 0);
            directory.extend(field);
        }
        self.set(DIRECTORY, directory);
    }
}

impl Default for Files {
    fn default() -> Self {
        Files::new()
    }
}

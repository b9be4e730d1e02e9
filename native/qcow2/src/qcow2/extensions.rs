// SPDX-License-Identifier: Apache-2.0
//! Header extensions: what stands behind the header's fields, kept as it is where it is not known; and the table that
//! gives features their names. (QEMU, docs/interop/qcow2.)

use super::header::incompatible;
use crate::bytes::be32;
use crate::error::{Error, Result};

/// Header extensions.
pub(crate) mod extension {
    pub(crate) const END: u32 = 0;
    pub(crate) const BACKING_FORMAT: u32 = 0xe279_2aca;
    pub(crate) const FEATURE_NAMES: u32 = 0x6803_f857;
    pub(crate) const BITMAPS: u32 = 0x2385_2875;
    pub(crate) const DATA_FILE: u32 = 0x4441_5441;
    pub(crate) const CRYPTO: u32 = 0x0537_be77;
}

/// A header extension as it stands in the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Extension {
    pub(crate) kind: u32,
    pub(crate) data: Vec<u8>,
}

pub(super) fn parse_extensions(
    cluster: &[u8],
    start: usize,
    backing_offset: u64,
) -> Result<Vec<Extension>> {
    let cut = || Error::invalid("a header extension reaches beyond the first cluster");
    // The extensions end at the backing file's name, if they have no end mark.
    let end = if backing_offset == 0 {
        cluster.len()
    } else {
        cluster.len().min(backing_offset as usize)
    };
    let mut found = Vec::new();
    let mut at = start;
    while at + 8 <= end {
        let kind = be32(cluster, at).ok_or_else(cut)?;
        let len = be32(cluster, at + 4).ok_or_else(cut)? as usize;
        if kind == extension::END {
            break;
        }
        let data = cluster
            .get(at + 8..at.saturating_add(8).saturating_add(len))
            .ok_or_else(cut)?;
        if at + 8 + len > end {
            return Err(cut());
        }
        found.push(Extension {
            kind,
            data: data.to_vec(),
        });
        at += 8 + len.next_multiple_of(8);
    }
    Ok(found)
}

pub(super) fn refuse_unknown(bits: u64, extensions: &[Extension]) -> Result<()> {
    let unknown = bits & !incompatible::KNOWN;
    if unknown == 0 {
        return Ok(());
    }
    let table = extensions
        .iter()
        .find(|extension| extension.kind == extension::FEATURE_NAMES);
    let table = table.map_or(&[][..], |extension| &extension.data);
    let name = |bit: u32| {
        let named = table
            .chunks_exact(48)
            .find(|entry| matches!(entry, [0, number, ..] if u32::from(*number) == bit));
        let name = named.and_then(|entry| entry.get(2..)).unwrap_or(&[]);
        let name: Vec<u8> = name.iter().copied().take_while(|byte| *byte != 0).collect();
        if name.is_empty() {
            format!("bit {bit}")
        } else {
            format!("'{}'", String::from_utf8_lossy(&name).escape_debug())
        }
    };
    let names: Vec<String> = (0..64)
        .filter(|bit| unknown >> bit & 1 != 0)
        .map(name)
        .collect();
    Err(Error::unsupported(format!(
        "unknown incompatible features: {}",
        names.join(", ")
    )))
}

/// The feature name table that QEMU writes too, for readers that do not know a feature.
pub(crate) fn feature_names() -> Extension {
    let names: [(u8, u8, &str); 8] = [
        (0, 0, "dirty bit"),
        (0, 1, "corrupt bit"),
        (0, 2, "external data file"),
        (0, 3, "compression type"),
        (0, 4, "extended L2 entries"),
        (1, 0, "lazy refcounts"),
        (2, 0, "bitmaps"),
        (2, 1, "raw external data"),
    ];
    let mut data = Vec::with_capacity(48 * names.len());
    for (kind, bit, name) in names {
        data.extend_from_slice(&[kind, bit]);
        data.extend_from_slice(name.as_bytes());
        data.resize(data.len().next_multiple_of(48), 0);
    }
    Extension {
        kind: extension::FEATURE_NAMES,
        data,
    }
}

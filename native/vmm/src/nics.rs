// SPDX-License-Identifier: Apache-2.0
//! The definition's network interfaces: their addresses and their links.

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;

use crate::config::{LinkKind, Nic};
use crate::devices::NicSpec;
use crate::error::{Error, Kind, Result};
use crate::net::{Link, Stream, Tap};
use crate::virtio::net::MAC;

/// Takes all of them. `files` has the descriptors of each interface's link, in the same order.
///
/// # Errors
/// `InvalidArgument`, with the interface as the argument.
pub fn open(nics: &[Nic], files: Vec<Vec<OwnedFd>>) -> Result<Vec<NicSpec>> {
    let mut ids = BTreeSet::new();
    nics.iter()
        .zip(files)
        .enumerate()
        .map(|(index, (nic, mut files))| {
            let helpers = files.split_off(files.len().saturating_sub(nic.vhost_fds.len()));
            if !ids.insert(&nic.id) {
                return Err(Error::invalid(
                    format!("nics[{index}].id"),
                    format!("{:?} is the id of another interface", nic.id),
                ));
            }
            let few = match nic.link {
                LinkKind::Tap => !files.is_empty(),
                LinkKind::Stream => files.len() == 1,
                LinkKind::Hub => files.is_empty(),
            };
            if !few {
                return Err(Error::invalid(
                    format!("nics[{index}].tap_fds"),
                    "a tap has at least one descriptor, a stream exactly one, a hub none",
                ));
            }
            let fit = nic.link == LinkKind::Tap && helpers.len() == files.len();
            if !helpers.is_empty() && !fit {
                return Err(Error::invalid(
                    format!("nics[{index}].vhost_fds"),
                    "one for each queue of a tap, or none",
                ));
            }
            Ok(NicSpec {
                id: nic.id.clone(),
                mac: address(&nic.mac).ok_or_else(|| {
                    Error::invalid(
                        format!("nics[{index}].mac"),
                        format!("{:?} is not six pairs of hex digits, or a group's", nic.mac),
                    )
                })?,
                queues: nic.queues,
                slot: nic.slot,
                carrier: nic.carrier,
                link: link(nic.link, files, helpers).map_err(|e| {
                    let message = format!("not a {:?} that can be used: {e}", nic.link);
                    Error::new(Kind::InvalidArgument, format!("nic/{}", nic.id), message)
                })?,
            })
        })
        .collect()
}

fn link(kind: LinkKind, mut files: Vec<OwnedFd>, helpers: Vec<OwnedFd>) -> std::io::Result<Link> {
    Ok(match (kind, files.pop()) {
        (LinkKind::Stream, Some(socket)) => Link::Stream(Box::new(Stream::new(socket)?)),
        (LinkKind::Hub, _) => Link::Hub(Box::default()),
        (_, last) => {
            files.extend(last);
            Link::Tap(Tap::new(files)?.helped(helpers))
        }
    })
}

/// A station's address, as `52:54:00:12:34:56`.
pub(crate) fn address(text: &str) -> Option<[u8; MAC]> {
    let mut bytes = [0; MAC];
    let mut pairs = text.split(':');
    for byte in &mut bytes {
        let pair = pairs.next().filter(|pair| {
            pair.len() == 2 && pair.bytes().all(|digit| digit.is_ascii_hexdigit())
        })?;
        *byte = u8::from_str_radix(pair, 16).ok()?;
    }
    let [first, ..] = bytes;
    (pairs.next().is_none() && first & 1 == 0).then_some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nic(id: &str, mac: &str) -> Nic {
        Nic {
            id: id.to_owned(),
            mac: mac.to_owned(),
            queues: 0,
            slot: None,
            carrier: true,
            link: LinkKind::Tap,
            tap_fds: Vec::new(),
            vhost_fds: Vec::new(),
        }
    }

    fn null() -> Vec<OwnedFd> {
        vec![std::fs::File::open("/dev/null").unwrap().into()]
    }

    #[test]
    fn an_address_is_six_pairs_of_one_station() {
        assert_eq!(
            address("52:54:00:ab:cd:ef"),
            Some([0x52, 0x54, 0, 0xab, 0xcd, 0xef])
        );
        for bad in [
            "",
            "52:54:00:ab:cd",
            "52:54:00:ab:cd:ef:01",
            "52:54:00:ab:cd:+f",
            "52540:0:ab:cd:ef",
            "53:54:00:ab:cd:ef",
        ] {
            assert_eq!(address(bad), None, "{bad}");
        }
    }

    #[test]
    fn what_is_no_tap_is_refused_by_its_slot() {
        let refused = open(&[nic("net", "52:54:00:00:00:01")], vec![null()]);
        let error = refused.err().unwrap();
        assert_eq!(
            (error.kind, error.argument.as_str()),
            (Kind::InvalidArgument, "nic/net")
        );
        let without = open(&[nic("net", "52:54:00:00:00:01")], vec![Vec::new()]);
        assert_eq!(without.err().unwrap().argument, "nics[0].tap_fds");
    }

    #[test]
    fn a_tap_has_a_helper_for_each_queue_or_none() {
        let helped = |vhost_fds, link| Nic {
            vhost_fds,
            link,
            ..nic("net", "52:54:00:00:00:01")
        };
        for (nic, files) in [
            (helped(vec![7, 8], LinkKind::Tap), 3),
            (helped(vec![7], LinkKind::Tap), 1),
            (helped(vec![7], LinkKind::Stream), 2),
        ] {
            let files = (0..files).flat_map(|_| null()).collect();
            let refused = open(&[nic], vec![files]).err().unwrap();
            assert!(["nics[0].vhost_fds", "nics[0].tap_fds"].contains(&refused.argument.as_str()));
        }
    }
}

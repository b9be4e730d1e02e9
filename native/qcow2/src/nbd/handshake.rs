// SPDX-License-Identifier: Apache-2.0
//! The beginning of a connection: fixed newstyle negotiation, on a blocking socket with a deadline.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use crate::nbd::wire::{self, info, option, reply, transmission, OptionHeader};

/// A client that says nothing for so long is dropped.
const PATIENCE: Duration = Duration::from_secs(30);
/// The longest option, and the most of them, in one handshake.
const MAX_OPTION: u32 = 64 * 1024;
const MAX_OPTIONS: u32 = 256;
/// The largest request, and what is best asked for at once.
pub(crate) const MAX_REQUEST: u32 = 32 << 20;
const PREFERRED: u32 = 64 * 1024;

/// What is served.
pub(crate) struct Export<'a> {
    pub(crate) name: &'a str,
    pub(crate) size: u64,
    pub(crate) read_only: bool,
    /// What places and lengths of requests must be multiples of.
    pub(crate) unit: u32,
    /// The bitmaps that clients may ask for.
    pub(crate) bitmaps: &'a [String],
}

/// What was agreed on.
#[derive(Debug, Clone, Default)]
pub(crate) struct Agreed {
    pub(crate) structured: bool,
    /// The metadata contexts that the client has chosen, by their number: 0 is base:allocation, then come the
    /// export's bitmaps.
    pub(crate) contexts: Vec<u32>,
}

impl Export<'_> {
    fn flags(&self, agreed: &Agreed) -> u16 {
        let mut flags = transmission::HAS_FLAGS
            | transmission::SEND_FLUSH
            | transmission::SEND_FUA
            | transmission::SEND_TRIM
            | transmission::SEND_WRITE_ZEROES
            | transmission::CAN_MULTI_CONN;
        if self.read_only {
            flags |= transmission::READ_ONLY;
        }
        if agreed.structured {
            flags |= transmission::SEND_DF;
        }
        flags
    }

    /// The contexts that a query names. In a listing it may be a name space, or all that is in one.
    fn matching<'a>(&'a self, query: &'a [u8], listing: bool) -> impl Iterator<Item = u32> + 'a {
        let names = std::iter::once(wire::ALLOCATION.to_owned()).chain(
            self.bitmaps
                .iter()
                .map(|name| format!("{}{name}", wire::DIRTY_BITMAP)),
        );
        names.zip(0..).filter_map(move |(name, number)| {
            let open =
                matches!(query, b"base:" | b"qemu:") || query == wire::DIRTY_BITMAP.as_bytes();
            let named =
                name.as_bytes() == query || (listing && open && name.as_bytes().starts_with(query));
            named.then_some(number)
        })
    }

    fn context(&self, number: u32) -> Vec<u8> {
        let mut described = number.to_be_bytes().to_vec();
        match number
            .checked_sub(1)
            .and_then(|n| self.bitmaps.get(n as usize))
        {
            Some(bitmap) => {
                described.extend(wire::DIRTY_BITMAP.as_bytes());
                described.extend(bitmap.as_bytes());
            }
            None => described.extend(wire::ALLOCATION.as_bytes()),
        }
        described
    }

    fn is_called(&self, name: &[u8]) -> bool {
        name.is_empty() || name == self.name.as_bytes()
    }
}

/// Negotiate; None when the client has gone or wants nothing.
pub(crate) fn negotiate(socket: &mut UnixStream, export: &Export) -> io::Result<Option<Agreed>> {
    socket.set_nonblocking(false)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.set_write_timeout(Some(PATIENCE))?;
    let mut hello = wire::INIT_MAGIC.to_vec();
    hello.extend(wire::OPTION_MAGIC.to_be_bytes());
    hello.extend((wire::FIXED_NEWSTYLE | wire::NO_ZEROES).to_be_bytes());
    socket.write_all(&hello)?;
    let mut flags = [0u8; 4];
    socket.read_exact(&mut flags)?;
    let flags = u32::from_be_bytes(flags);
    if flags & !u32::from(wire::FIXED_NEWSTYLE | wire::NO_ZEROES) != 0 {
        return Err(broken("client flags that do not exist"));
    }
    let no_zeroes = flags & u32::from(wire::NO_ZEROES) != 0;
    let mut agreed = Agreed::default();
    for _ in 0..MAX_OPTIONS {
        let mut header = [0u8; OptionHeader::LEN];
        socket.read_exact(&mut header)?;
        let header =
            OptionHeader::parse(&header).ok_or_else(|| broken("an option without its magic"))?;
        if header.len > MAX_OPTION {
            return Err(broken("an option that is too long"));
        }
        let mut data = vec![0u8; header.len as usize];
        socket.read_exact(&mut data)?;
        let mut answer = Vec::new();
        let mut say =
            |kind: u32, data: &[u8]| answer.extend(wire::option_reply(header.option, kind, data));
        let mut over = None;
        match header.option {
            option::EXPORT_NAME => {
                if !export.is_called(&data) {
                    return Ok(None);
                }
                let mut description = export.size.to_be_bytes().to_vec();
                description.extend(export.flags(&agreed).to_be_bytes());
                description.resize(if no_zeroes { 10 } else { 134 }, 0);
                socket.write_all(&description)?;
                return Ok(Some(agreed));
            }
            option::ABORT => {
                say(reply::ACK, &[]);
                over = Some(None);
            }
            option::LIST => {
                let mut name = (export.name.len() as u32).to_be_bytes().to_vec();
                name.extend(export.name.as_bytes());
                say(reply::SERVER, &name);
                say(reply::ACK, &[]);
            }
            option::STRUCTURED_REPLY if data.is_empty() => {
                agreed.structured = true;
                say(reply::ACK, &[]);
            }
            option::INFO | option::GO => match wire::parse_name(&data) {
                None => say(reply::INVALID, &[]),
                Some((name, _)) if !export.is_called(name) => say(reply::UNKNOWN, &[]),
                Some(_) => {
                    let mut described = info::EXPORT.to_be_bytes().to_vec();
                    described.extend(export.size.to_be_bytes());
                    described.extend(export.flags(&agreed).to_be_bytes());
                    say(reply::INFO, &described);
                    let mut sizes = info::BLOCK_SIZE.to_be_bytes().to_vec();
                    [export.unit, PREFERRED, MAX_REQUEST]
                        .iter()
                        .for_each(|size| sizes.extend(size.to_be_bytes()));
                    say(reply::INFO, &sizes);
                    say(reply::ACK, &[]);
                    if header.option == option::GO {
                        over = Some(Some(()));
                    }
                }
            },
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => {
                match wire::parse_queries(&data).filter(|_| agreed.structured) {
                    None => say(reply::INVALID, &[]),
                    Some((name, _)) if !export.is_called(name) => say(reply::UNKNOWN, &[]),
                    Some((_, queries)) => {
                        let listing = header.option == option::LIST_META_CONTEXT;
                        let mut chosen: Vec<u32> = queries
                            .iter()
                            .flat_map(|query| export.matching(query, listing))
                            .collect();
                        if listing && queries.is_empty() {
                            chosen = (0..=export.bitmaps.len() as u32).collect();
                        }
                        chosen.sort_unstable();
                        chosen.dedup();
                        for number in &chosen {
                            say(reply::META_CONTEXT, &export.context(*number));
                        }
                        if !listing {
                            agreed.contexts = chosen;
                        }
                        say(reply::ACK, &[]);
                    }
                }
            }
            _ => say(reply::UNSUPPORTED, &[]),
        }
        socket.write_all(&answer)?;
        match over {
            Some(Some(())) => return Ok(Some(agreed)),
            Some(None) => return Ok(None),
            None => {}
        }
    }
    Err(broken("too many options"))
}

/// The error of a client that breaks the protocol.
pub(crate) fn broken(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}

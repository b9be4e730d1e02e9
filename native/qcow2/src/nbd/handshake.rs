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
}

/// What was agreed on.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Agreed {
    pub(crate) structured: bool,
    /// The client has chosen base:allocation (under number 1).
    pub(crate) allocation: bool,
}

impl Export<'_> {
    fn flags(&self, agreed: Agreed) -> u16 {
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
                description.extend(export.flags(agreed).to_be_bytes());
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
                    described.extend(export.flags(agreed).to_be_bytes());
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
                        let all =
                            listing && (queries.is_empty() || queries.contains(&&b"base:"[..]));
                        let chosen = all || queries.contains(&&b"base:allocation"[..]);
                        if chosen {
                            let mut context = 1u32.to_be_bytes().to_vec();
                            context.extend(b"base:allocation");
                            say(reply::META_CONTEXT, &context);
                        }
                        if !listing {
                            agreed.allocation = chosen;
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

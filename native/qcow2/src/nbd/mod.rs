// SPDX-License-Identifier: Apache-2.0
//! An NBD server on a unix socket: what QEMU, the kernel, fio and nbdkit's tools speak.
//!
//! Fixed newstyle negotiation, structured replies, base:allocation, flush, FUA, trim, write-zeroes and
//! several connections at once, which see each other's writes (the image is one). Left out: TLS (the
//! socket's permissions say who may connect), dirty bitmaps, resizing, extended headers.

mod connection;
mod handshake;
mod wire;

use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::Arc;
use std::time::Duration;

use crate::error::{Error, Result};
use crate::image::Image;
use connection::Connection;
use handshake::{negotiate, Export};

/// How to serve.
#[derive(Debug, Clone)]
pub struct ServeOptions {
    /// The export's name; a client that names none gets it, too.
    pub export: String,
    /// Go on when the last client has left.
    pub persistent: bool,
    /// The most clients at once; others are refused by hanging up.
    pub connections: usize,
}

/// Serve an active image on a listening socket until `stop` is set, or, unless persistent, until the
/// last client has left. What clients were told is durable was made so; the caller inactivates the image.
pub fn serve(
    image: &Arc<Image>,
    listener: &UnixListener,
    options: &ServeOptions,
    stop: &AtomicBool,
) -> Result<()> {
    listener
        .set_nonblocking(true)
        .map_err(|e| Error::io("the listening socket", &e))?;
    let clients = AtomicUsize::new(0);
    let mut served = false;
    std::thread::scope(|scope| loop {
        if stop.load(Ordering::Relaxed)
            || (served && !options.persistent && clients.load(Ordering::SeqCst) == 0)
        {
            return Ok(());
        }
        match listener.accept() {
            Ok((socket, _)) if clients.load(Ordering::SeqCst) < options.connections => {
                served = true;
                clients.fetch_add(1, Ordering::SeqCst);
                let clients = &clients;
                scope.spawn(move || {
                    // A client's own faults end its connection and concern nobody else.
                    let _ = client(image, socket, options, stop);
                    clients.fetch_sub(1, Ordering::SeqCst);
                });
            }
            Ok((socket, _)) => drop(socket),
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                std::thread::sleep(Duration::from_millis(20))
            }
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => {
                stop.store(true, Ordering::Relaxed);
                return Err(Error::io("accept a client", &e));
            }
        }
    })
}

fn client(
    image: &Arc<Image>,
    mut socket: UnixStream,
    options: &ServeOptions,
    stop: &AtomicBool,
) -> Result<()> {
    let export = Export {
        name: &options.export,
        size: image.size(),
        read_only: image.read_only(),
    };
    let agreed = negotiate(&mut socket, &export).map_err(|e| Error::io("handshake", &e))?;
    match agreed {
        None => Ok(()),
        Some(agreed) => {
            let mut connection = Connection::new(image.clone(), agreed)?;
            connection
                .serve(&mut socket, stop)
                .map_err(|e| Error::io("serve a client", &e))
        }
    }
}

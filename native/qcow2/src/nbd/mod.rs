// SPDX-License-Identifier: Apache-2.0
//! An NBD server on a unix socket: what QEMU, the kernel, fio and nbdkit's tools speak.
//!
//! Fixed newstyle negotiation, structured replies, base:allocation and qemu:dirty-bitmap, flush, FUA, trim, write-zeroes and
//! several connections at once, which see each other's writes (the image is one). Left out: TLS (the
//! socket's permissions say who may connect), resizing, extended headers.
//!
//! | module       | job                                                             |
//! |--------------|-----------------------------------------------------------------|
//! | `handshake`  | options, and what was agreed                                    |
//! | `connection` | one client's requests, from its socket to the engine and back   |
//! | `inbox`      | what comes from the socket                                      |
//! | `outbox`     | answers on their way                                            |
//! | `memory`     | memory for requests                                             |
//! | `status`     | block status                                                    |
//! | `wire`       | headers and numbers of the protocol                             |

mod connection;
mod handshake;
mod inbox;
mod memory;
mod outbox;
mod status;
mod wire;

use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::Arc;
use std::time::Duration;

use crate::engine::Pool;
use crate::error::{Error, Result};
use crate::image::Image;
use crate::qcow2::bitmaps::BitmapView;
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
    /// Bitmaps of the image that clients may ask for, by name.
    pub bitmaps: Vec<String>,
    /// Threads that expand, encrypt and decrypt besides the clients' own, for all of them together.
    pub helpers: usize,
}

/// Closes the pool however serving ends, for its threads are waited for.
struct Closing(Arc<Pool>);

impl Drop for Closing {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// Serve an active image on a listening socket until `stop` is set, or, unless persistent, until the
/// last client has left. What clients were told is durable was made so; the caller inactivates the image.
pub fn serve(
    image: &Arc<Image>,
    listener: &UnixListener,
    options: &ServeOptions,
    stop: &AtomicBool,
) -> Result<()> {
    for name in &options.bitmaps {
        BitmapView::open(image, name)?;
    }
    listener
        .set_nonblocking(true)
        .map_err(|e| Error::io("the listening socket", &e))?;
    let clients = AtomicUsize::new(0);
    let mut served = false;
    let pool = Pool::new();
    std::thread::scope(|scope| {
        let _closing = Closing(pool.clone());
        let helpers = if image.is_coded() { options.helpers } else { 0 };
        for _ in 0..helpers {
            scope.spawn(|| pool.work());
        }
        let pool = (helpers > 0).then_some(&pool);
        loop {
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
                        let _ = converse(image, socket, options, pool, stop);
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
        }
    })
}

/// Serve one client that is connected already, from its handshake to its end, on this thread alone.
pub fn serve_client(
    image: &Arc<Image>,
    socket: UnixStream,
    options: &ServeOptions,
    stop: &AtomicBool,
) -> Result<()> {
    converse(image, socket, options, None, stop)
}

fn converse(
    image: &Arc<Image>,
    mut socket: UnixStream,
    options: &ServeOptions,
    pool: Option<&Arc<Pool>>,
    stop: &AtomicBool,
) -> Result<()> {
    let export = Export {
        name: &options.export,
        size: image.size(),
        read_only: image.read_only(),
        unit: if image.encrypted() { 512 } else { 1 },
        bitmaps: &options.bitmaps,
    };
    let agreed = negotiate(&mut socket, &export).map_err(|e| Error::io("handshake", &e))?;
    match agreed {
        None => Ok(()),
        Some(agreed) => {
            let mut connection = Connection::new(image.clone(), &options.bitmaps, agreed, pool)?;
            connection
                .serve(&mut socket, stop)
                .map_err(|e| Error::io("serve a client", &e))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{File, OpenOptions as FileOptions};
    use std::io::{Read, Write};

    use super::*;
    use crate::disk::Disk;
    use crate::{create_qcow2, CreateOptions, Format, LayerFiles, OpenOptions};

    const SIZE: u64 = 1 << 20;

    fn image(name: &str) -> Arc<Image> {
        let path = std::env::temp_dir().join(format!("vmbus-nbd-{}-{name}", std::process::id()));
        let open = |path: &std::path::Path| -> File {
            FileOptions::new()
                .read(true)
                .write(true)
                .open(path)
                .unwrap()
        };
        let options = CreateOptions {
            size: SIZE,
            cluster_size: 4096,
            ..CreateOptions::default()
        };
        File::create_new(&path).unwrap();
        create_qcow2(&open(&path), None, &options).unwrap();
        let layer = LayerFiles {
            format: Format::Qcow2,
            file: open(&path),
            data_file: None,
            backing_name: None,
            data_name: None,
            secret: None,
        };
        std::fs::remove_file(path).unwrap();
        let image = Image::open_chain(vec![layer], OpenOptions::default()).unwrap();
        image.activate().unwrap();
        Arc::new(image)
    }

    fn request(command: u16, offset: u64, data: &[u8], len: u32) -> Vec<u8> {
        let mut bytes = 0x2560_9513u32.to_be_bytes().to_vec();
        bytes.extend(0u16.to_be_bytes());
        bytes.extend(command.to_be_bytes());
        bytes.extend(7u64.to_be_bytes());
        bytes.extend(offset.to_be_bytes());
        bytes.extend(len.to_be_bytes());
        bytes.extend(data);
        bytes
    }

    /// A handshake that chooses base:allocation, then `sent`, then the end of the connection.
    fn talk(image: &Arc<Image>, sent: &[u8]) -> Result<()> {
        let (server, mut client) = UnixStream::pair().unwrap();
        let mut hello = 3u32.to_be_bytes().to_vec();
        let query = b"\0\0\0\0\0\0\0\x01\0\0\0\x0fbase:allocation";
        for (number, data) in [(8u32, &b""[..]), (10, query), (7, b"\0\0\0\0\0\0")] {
            hello.extend(b"IHAVEOPT");
            hello.extend(number.to_be_bytes());
            hello.extend((data.len() as u32).to_be_bytes());
            hello.extend(data);
        }
        client.write_all(&hello).unwrap();
        client.write_all(sent).unwrap();
        client.shutdown(std::net::Shutdown::Write).unwrap();
        let options = ServeOptions {
            export: String::new(),
            persistent: false,
            connections: 1,
            bitmaps: Vec::new(),
            helpers: 0,
        };
        serve_client(image, server, &options, &AtomicBool::new(false))
    }

    #[test]
    fn a_client_that_breaks_off_in_the_middle_of_writes_leaves_nothing_under_way() {
        let image = image("breaks-off");
        let mut sent = request(1, 4096, &[5; 512], 512);
        sent.extend(request(3, 0, &[], 0));
        sent.extend([0xff; 28]);
        assert!(talk(&image, &sent).is_err());
        // Others can write to the same cluster, flush, and the image can be closed.
        let mut disk = Disk::new(image.clone()).unwrap();
        disk.write(4096, &[6; 512]).unwrap();
        disk.flush().unwrap();
        drop(disk);
        image.inactivate().unwrap();
    }

    /// Bytes of this process in memory.
    fn resident() -> usize {
        let status = std::fs::read_to_string("/proc/self/statm").unwrap();
        let pages: usize = status.split(' ').nth(1).unwrap().parse().unwrap();
        pages * 4096
    }

    #[test]
    fn a_client_that_never_reads_makes_the_server_hold_little_and_does_not_keep_it_from_stopping() {
        let image = image("never-reads");
        let (server, mut client) = UnixStream::pair().unwrap();
        client.write_all(&3u32.to_be_bytes()).unwrap();
        client.write_all(b"IHAVEOPT\0\0\0\x01\0\0\0\0").unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let before = resident();
        let thread = {
            let (image, stop) = (image.clone(), stop.clone());
            let options = ServeOptions {
                export: String::new(),
                persistent: false,
                connections: 1,
                bitmaps: Vec::new(),
                helpers: 0,
            };
            std::thread::spawn(move || serve_client(&image, server, &options, &stop))
        };
        // A gigabyte of answers, until the server takes no more.
        client
            .set_write_timeout(Some(Duration::from_millis(500)))
            .unwrap();
        let asked = request(0, 0, &[], SIZE as u32);
        let taken = (0..1000).take_while(|_| client.write_all(&asked).is_ok());
        let taken = taken.count();
        std::thread::sleep(Duration::from_millis(300));
        let grown = resident().saturating_sub(before);
        assert!(grown < 200 << 20, "{grown} bytes for {taken} requests");
        stop.store(true, Ordering::Relaxed);
        thread.join().unwrap().unwrap();
        image.inactivate().unwrap();
    }

    #[test]
    fn block_status_behind_a_write_that_reads_the_same_table_is_answered() {
        let image = image("status");
        let mut sent = request(1, 4096, &[5; 512], 512);
        sent.extend(request(7, 0, &[], SIZE as u32));
        talk(&image, &sent).unwrap();
        image.inactivate().unwrap();
    }

    /// The simple answers to reads and writes, in any order: the data of each read by its offset.
    fn answers(
        socket: &mut UnixStream,
        reads: &[(u64, u32)],
        writes: usize,
    ) -> Vec<(u64, Vec<u8>)> {
        let mut found = Vec::new();
        for _ in 0..reads.len() + writes {
            let mut head = [0; 16];
            socket.read_exact(&mut head).unwrap();
            assert_eq!(&head[..8], &[0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0]);
            let cookie = u64::from_be_bytes(head[8..].try_into().unwrap()) as usize;
            if let Some((offset, len)) = reads.get(cookie) {
                let mut data = vec![0; *len as usize];
                socket.read_exact(&mut data).unwrap();
                found.push((*offset, data));
            }
        }
        found
    }

    #[test]
    fn requests_are_the_same_however_the_socket_cuts_them() {
        let pattern: Vec<u8> = (0..SIZE as u32)
            .map(|n| (n.wrapping_mul(n) >> 9) as u8)
            .collect();
        // Around the inbox's size, and odd ones; the first half is read, the second written.
        let lens = [
            1u32, 28, 4096, 65_507, 65_508, 65_536, 65_537, 200_000, 3, 512,
        ];
        for step in [5, 28, 1000, 65_536, 65_537, usize::MAX] {
            let image = image(&format!("cut-{step}"));
            let mut disk = Disk::new(image.clone()).unwrap();
            disk.write(0, &pattern[..SIZE as usize / 2]).unwrap();
            let half = SIZE / 2;
            let mut sent = Vec::new();
            let mut reads = Vec::new();
            let mut from = 0;
            for (n, len) in lens.iter().enumerate() {
                let mut read = request(0, from, &[], *len);
                read[8..16].copy_from_slice(&(n as u64).to_be_bytes());
                sent.extend(read);
                reads.push((from, *len));
                let data = &pattern[from as usize..][..*len as usize];
                let mut write = request(1, half + from, data, *len);
                write[8..16].copy_from_slice(&1000u64.to_be_bytes());
                sent.extend(write);
                from += u64::from(*len);
            }
            let (server, mut client) = UnixStream::pair().unwrap();
            let serving = {
                let image = image.clone();
                std::thread::spawn(move || {
                    let options = ServeOptions {
                        export: String::new(),
                        persistent: false,
                        connections: 1,
                        bitmaps: Vec::new(),
                        helpers: 0,
                    };
                    serve_client(&image, server, &options, &AtomicBool::new(false))
                })
            };
            // An old handshake's end: the export without structured replies.
            client.write_all(&3u32.to_be_bytes()).unwrap();
            client.write_all(b"IHAVEOPT\0\0\0\x01\0\0\0\0").unwrap();
            let mut hello = [0; 18 + 10];
            client.read_exact(&mut hello).unwrap();
            let found = std::thread::scope(|scope| {
                let mut writer = client.try_clone().unwrap();
                let pieces = sent.chunks(step.min(sent.len()));
                scope.spawn(move || {
                    for piece in pieces {
                        writer.write_all(piece).unwrap();
                    }
                });
                answers(&mut client, &reads, lens.len())
            });
            for (offset, data) in found {
                assert!(data == pattern[offset as usize..][..data.len()], "{step}");
            }
            drop(client);
            serving.join().unwrap().unwrap();
            let mut written = vec![0; from as usize];
            disk.read(half, &mut written).unwrap();
            assert!(written == pattern[..written.len()], "{step}");
            drop(disk);
            image.inactivate().unwrap();
        }
    }
}

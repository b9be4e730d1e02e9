// SPDX-License-Identifier: Apache-2.0
//! What a hostile client sends to the NBD server, from its first byte on.
//!
//! The first byte chooses between the input as it is and the input behind a handshake that went well;
//! what follows is sent as it stands, the sending side is closed, and everything that comes back is
//! read. Checked are: nothing panics, the server comes to its end, memory is bounded, and the image is
//! as sound afterwards as before.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::AtomicBool;

use vmbus_qcow2::{check, create_qcow2, serve_client, CreateOptions, Format, Repair, ServeOptions};

use crate::disk::{file, open, CACHE};
use crate::memory::{bounded, LIMIT};

const SIZE: u64 = 1 << 20;
/// What the server may hold for one client: requests and answers, as connection.rs says, each twice
/// while it is copied.
const CLIENT: usize = 2 * (192 << 20);

/// Fixed newstyle without zeroes, structured replies, base:allocation, GO.
fn handshake() -> Vec<u8> {
    let mut hello = 3u32.to_be_bytes().to_vec();
    let mut option = |number: u32, data: &[u8]| {
        hello.extend(b"IHAVEOPT");
        hello.extend(number.to_be_bytes());
        hello.extend((data.len() as u32).to_be_bytes());
        hello.extend(data);
    };
    option(8, &[]);
    let context = b"base:allocation";
    let mut query = 0u32.to_be_bytes().to_vec();
    query.extend(1u32.to_be_bytes());
    query.extend((context.len() as u32).to_be_bytes());
    query.extend(context);
    option(10, &query);
    option(7, &[0, 0, 0, 0, 0, 0]);
    hello
}

/// The target.
pub fn run(data: &[u8]) {
    let Some((first, rest)) = data.split_first() else {
        return;
    };
    let mut sent = if first & 1 == 0 {
        handshake()
    } else {
        Vec::new()
    };
    sent.extend(rest);
    let disk = file(&[]);
    let options = CreateOptions {
        size: SIZE,
        cluster_size: 4096,
        ..CreateOptions::default()
    };
    create_qcow2(&disk, None, &options).expect("create");
    let image = open(&disk, Format::Qcow2, first & 2 != 0).expect("open");
    bounded("a client", LIMIT + CACHE + CLIENT, || {
        let (server, client) = UnixStream::pair().expect("socketpair");
        let options = ServeOptions {
            export: "disk".to_owned(),
            persistent: false,
            connections: 1,
            bitmaps: Vec::new(),
            helpers: 0,
        };
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let (image, options, stop) = (&image, &options, &stop);
            scope.spawn(move || {
                // A client that breaks the protocol is told nothing more.
                let _ = serve_client(image, server, options, stop);
            });
            let mut receiving = client.try_clone().expect("dup");
            scope.spawn(move || {
                let mut bytes = [0; 65536];
                while receiving.read(&mut bytes).is_ok_and(|count| count > 0) {}
            });
            // The server may have hung up.
            let _ = (&client).write_all(&sent);
            let _ = client.shutdown(Shutdown::Write);
        });
    });
    image.inactivate().expect("inactivate");
    let report = check(&disk, Repair::None, false).expect("check");
    assert_eq!(report.corruptions, 0, "{:?}", report.messages);
}

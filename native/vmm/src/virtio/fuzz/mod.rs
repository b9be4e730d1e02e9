// SPDX-License-Identifier: Apache-2.0
//! Random guests against whole devices: no panic, no endless loop, and a device that still works afterwards.
//!
//! Of guests there are two: one hammers every register and all of configuration space with random accesses
//! (`registers`); one sets a device up as a driver does and then offers random chains, mostly nearly right, since those
//! get furthest (`guest`, and what it offers in `disks`, `network`, `streams`, `balloon`). A third kind of input is a
//! machine's state that somebody has changed (`states`). A failure names its seed (`seeds`, `random`). A panic in the
//! I/O thread shows as a device that hangs up on `pause`.
//!
//! The families of devices know nothing of one another, only of `guest`, `seeds` and `random`.

mod balloon;
mod disks;
mod guest;
mod network;
pub(crate) mod random;
mod registers;
pub(crate) mod seeds;
mod states;
mod streams;

// SPDX-License-Identifier: Apache-2.0
//! The C ABI of the core, which Python's cffi loads.
//!
//! Rules of every export: it takes and gives integers, pointers to plain memory and opaque handles; it returns 0 or
//! more for success and -1 for an error, whose description [`vmbus_error`](error::vmbus_error) gives on the same thread; a panic
//! inside becomes such an error (kind `Internal`) and never unwinds into the caller. Handles are made and freed
//! here, and belong to the caller in between.
//!
//! maturin makes the header with cbindgen, and cffi loads the library by it at run time; nothing but a test tells
//! whether both mean the same layout, hence [`vmbus_layout`](layout::vmbus_layout).

pub mod abi;
pub mod error;
pub mod event;
pub mod image;
pub mod layout;
pub mod machine;
pub mod sandbox;

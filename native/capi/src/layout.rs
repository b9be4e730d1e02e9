// SPDX-License-Identifier: Apache-2.0
//! What the ABI looks like from the inside, so that Python can compare it with what it read from the header.

use std::ffi::{c_char, CString};
use std::mem::{align_of, offset_of, size_of};
use std::sync::OnceLock;

use crate::event::VmbusEvent;

/// The version of this ABI. It grows with every change that an older caller would misread.
#[no_mangle]
pub extern "C" fn vmbus_abi_version() -> u32 {
    2
}

/// `field` of `VmbusEvent` as `VmbusEvent.field offset size`.
macro_rules! field {
    ($field:ident) => {{
        fn size<T>(_: fn(&VmbusEvent) -> &T) -> usize {
            size_of::<T>()
        }
        format!(
            "VmbusEvent.{} {} {}\n",
            stringify!($field),
            offset_of!(VmbusEvent, $field),
            size(|event| &event.$field)
        )
    }};
}

fn describe() -> String {
    [
        format!(
            "VmbusEvent {} {}\n",
            size_of::<VmbusEvent>(),
            align_of::<VmbusEvent>()
        ),
        field!(kind),
        field!(reserved),
        field!(id),
        field!(json),
    ]
    .concat()
}

/// One line a struct, `name size alignment`, followed by one line a field, `name.field offset size`: as the
/// compiler laid them out. The string lives as long as the library.
#[no_mangle]
pub extern "C" fn vmbus_layout() -> *const c_char {
    static LAYOUT: OnceLock<CString> = OnceLock::new();
    LAYOUT
        .get_or_init(|| CString::new(describe()).unwrap_or_default())
        .as_ptr()
}

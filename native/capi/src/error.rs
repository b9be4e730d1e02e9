// SPDX-License-Identifier: Apache-2.0
//! The one error boundary of the ABI: results and panics become a code and a message of the thread.

use std::any::Any;
use std::cell::RefCell;
use std::ffi::{c_char, c_int, CString};
use std::panic::{catch_unwind, AssertUnwindSafe};

/// What went wrong, in the words of `vmbus/wire/errors.py`.
#[derive(Debug)]
pub struct Failure {
    /// One of the kinds of `vmbus/wire/errors.py`.
    pub kind: &'static str,
    /// The argument it is about, "" if none.
    pub argument: String,
    /// A sentence for people.
    pub message: String,
}

impl Failure {
    /// A failure that is about no argument.
    pub fn new(kind: &'static str, message: impl Into<String>) -> Failure {
        Failure {
            kind,
            argument: String::new(),
            message: message.into(),
        }
    }

    /// A failure about `argument`.
    pub fn about(
        kind: &'static str,
        argument: impl Into<String>,
        message: impl Into<String>,
    ) -> Failure {
        Failure {
            kind,
            argument: argument.into(),
            message: message.into(),
        }
    }

    /// `kind`, `argument` and `message` as a JSON object.
    pub fn json(&self) -> String {
        serde_json::json!({
            "kind": self.kind,
            "argument": self.argument,
            "message": self.message,
        })
        .to_string()
    }
}

impl From<vmbus_sandbox::Error> for Failure {
    fn from(error: vmbus_sandbox::Error) -> Failure {
        Failure::new("Unavailable", error.to_string())
    }
}

impl From<vmbus_vmm::Error> for Failure {
    fn from(error: vmbus_vmm::Error) -> Failure {
        Failure::about(error.kind.as_str(), error.argument, error.message)
    }
}

thread_local! {
    static LAST: RefCell<CString> = RefCell::new(CString::default());
}

/// Carries out the body of an export: its value, or -1 and the thread's last error.
pub fn guard(body: impl FnOnce() -> Result<c_int, Failure>) -> c_int {
    // A panic leaves at worst a handle that fails from then on: its locks are poisoned, never half open.
    let failure = match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(value)) => return value,
        Ok(Err(failure)) => failure,
        Err(panic) => Failure::new("Internal", panic_message(panic.as_ref())),
    };
    remember(&failure);
    -1
}

fn panic_message(panic: &(dyn Any + Send)) -> String {
    let words = panic
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_default();
    format!("a panic in the core: {words}")
}

fn remember(failure: &Failure) {
    // JSON escapes NUL, so this cannot fail; an empty message would be no worse than that.
    let text = CString::new(failure.json()).unwrap_or_default();
    LAST.with(|last| *last.borrow_mut() = text);
}

/// The last error of the calling thread as JSON: `kind`, `argument`, `message`; "" if there was none.
///
/// Valid until the thread's next call into the core.
#[no_mangle]
pub extern "C" fn vmbus_error() -> *const c_char {
    LAST.with(|last| last.borrow().as_ptr())
}

/// Bytes that the caller lends for the length of one call.
///
/// # Safety
/// `data` is null (then `len` is 0) or points to `len` bytes that nobody writes meanwhile.
pub unsafe fn borrowed<'a>(data: *const u8, len: usize) -> &'a [u8] {
    if data.is_null() || len == 0 {
        return &[];
    }
    // SAFETY: the caller's promise, passed on.
    unsafe { std::slice::from_raw_parts(data, len) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::CStr;

    fn last() -> serde_json::Value {
        // SAFETY: vmbus_error gives a valid C string until this thread's next call.
        let text = unsafe { CStr::from_ptr(vmbus_error()) };
        serde_json::from_slice(text.to_bytes()).unwrap()
    }

    #[test]
    fn a_panic_is_an_error_of_kind_internal() {
        assert_eq!(guard(|| panic!("queue {} is gone", 7)), -1);
        assert_eq!(last()["kind"], "Internal");
        assert_eq!(last()["message"], "a panic in the core: queue 7 is gone");
    }

    #[test]
    fn an_error_keeps_its_kind_argument_and_message() {
        let value = guard(|| {
            Err(Failure::about(
                "InvalidArgument",
                "vcpus",
                "0 \"is\" too\0few",
            ))
        });
        assert_eq!(value, -1);
        let error = last();
        assert_eq!(error["kind"], "InvalidArgument");
        assert_eq!(error["argument"], "vcpus");
        assert_eq!(error["message"], "0 \"is\" too\0few");
    }

    #[test]
    fn success_gives_the_value() {
        assert_eq!(guard(|| Ok(1)), 1);
    }
}

// SPDX-License-Identifier: Apache-2.0
//! The error of this crate: a small, stable kind, a sentence for people, and the errno where the
//! kernel gave one.

use std::fmt;
use std::io;

/// What went wrong, coarsely enough to act on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// The caller asked for something malformed or out of range.
    InvalidArgument,
    /// The file is not what it is said to be, or its metadata contradicts itself.
    ImageInvalid,
    /// The header names another backing or data file than the caller does.
    BackingChanged,
    /// The image uses, or the caller wants, something that this version does not do.
    NotSupported,
    /// The passphrase is not one of the image's.
    AccessDenied,
    /// Somebody else holds the image.
    InUse,
    /// The image or the engine is not in a state in which this can be done.
    InvalidState,
    /// There is no room on the host.
    NoSpace,
    /// The device or the file system failed.
    Io,
}

impl Kind {
    /// The kind's name in vmbus/wire/errors.py. Host I/O failures are `Unavailable` there.
    pub fn wire_name(self) -> &'static str {
        match self {
            Kind::InvalidArgument => "InvalidArgument",
            Kind::ImageInvalid => "ImageInvalid",
            Kind::BackingChanged => "BackingChanged",
            Kind::NotSupported => "NotSupported",
            Kind::AccessDenied => "AccessDenied",
            Kind::InUse => "InUse",
            Kind::InvalidState => "InvalidState",
            Kind::NoSpace | Kind::Io => "Unavailable",
        }
    }
}

/// An error with its kind and its sentence.
#[derive(Debug, Clone)]
pub struct Error {
    kind: Kind,
    message: String,
    errno: Option<i32>,
    layer: Option<usize>,
}

/// The crate's result.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// A new error.
    pub fn new(kind: Kind, message: impl Into<String>) -> Error {
        Error {
            kind,
            message: message.into(),
            errno: None,
            layer: None,
        }
    }

    /// The file contradicts the format: `message` says how.
    pub fn invalid(message: impl Into<String>) -> Error {
        Error::new(Kind::ImageInvalid, message)
    }

    /// A feature that this version does not have.
    pub fn unsupported(message: impl Into<String>) -> Error {
        Error::new(Kind::NotSupported, message)
    }

    /// An error of the kernel, with what was being done.
    pub fn io(context: impl fmt::Display, error: &io::Error) -> Error {
        let errno = error.raw_os_error();
        let kind = match errno {
            Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG) => Kind::NoSpace,
            Some(libc::EOPNOTSUPP) => Kind::NotSupported,
            _ => Kind::Io,
        };
        Error {
            kind,
            message: format!("{context}: {error}"),
            errno,
            layer: None,
        }
    }

    /// As [`Error::io`], from a negative errno of io_uring.
    pub fn os(context: impl fmt::Display, errno: i32) -> Error {
        Error::io(context, &io::Error::from_raw_os_error(errno.abs()))
    }

    /// What went wrong.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The sentence, without the kind.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// The errno, where the kernel gave one.
    pub fn errno(&self) -> Option<i32> {
        self.errno
    }

    /// Which layer of a chain it is about, 0 being the active one; None when it is about no single one.
    pub fn layer(&self) -> Option<usize> {
        self.layer
    }

    /// The same error, about this layer.
    pub(crate) fn of_layer(mut self, layer: usize) -> Error {
        self.layer = Some(layer);
        self
    }

    /// The same error with what was being done in front.
    pub fn context(mut self, what: impl fmt::Display) -> Error {
        self.message = format!("{what}: {}", self.message);
        self
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

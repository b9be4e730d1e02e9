// SPDX-License-Identifier: Apache-2.0
//! The one error type of this crate.
//!
//! A kind is a kind of `vmbus/wire/errors.py` and becomes a D-Bus error name without change; the
//! argument is the field of the configuration that the error is about ("" if none); the message is a
//! sentence for people, with what was wrong and what would work.

use std::fmt;

/// What sort of thing went wrong; the names are those of `vmbus/wire/errors.py`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// An argument is malformed, out of range or contradicts another.
    InvalidArgument,
    /// The machine is not in a state in which this can be done.
    InvalidState,
    /// A disk image or a kernel is not what it is said to be.
    ImageInvalid,
    /// The header names another backing file than the definition.
    BackingChanged,
    /// An image that somebody else holds.
    InUse,
    /// A file that may not be read or written.
    AccessDenied,
    /// This host, this CPU or this version cannot do it.
    NotSupported,
    /// A kernel feature or a resource that is not there.
    Unavailable,
    /// The other side went away before it answered: the machine ended.
    Disconnected,
    /// It was told to stop.
    Cancelled,
    /// Something is not what it was when it was looked at.
    Changed,
    /// A bug of ours.
    Internal,
}

const KINDS: [Kind; 12] = [
    Kind::InvalidArgument,
    Kind::InvalidState,
    Kind::ImageInvalid,
    Kind::BackingChanged,
    Kind::InUse,
    Kind::AccessDenied,
    Kind::NotSupported,
    Kind::Unavailable,
    Kind::Disconnected,
    Kind::Cancelled,
    Kind::Changed,
    Kind::Internal,
];

impl Kind {
    /// The kind of this name.
    pub fn named(name: &str) -> Option<Kind> {
        KINDS.into_iter().find(|kind| kind.as_str() == name)
    }

    /// The name on the wire.
    pub const fn as_str(self) -> &'static str {
        match self {
            Kind::InvalidArgument => "InvalidArgument",
            Kind::InvalidState => "InvalidState",
            Kind::ImageInvalid => "ImageInvalid",
            Kind::BackingChanged => "BackingChanged",
            Kind::InUse => "InUse",
            Kind::AccessDenied => "AccessDenied",
            Kind::NotSupported => "NotSupported",
            Kind::Unavailable => "Unavailable",
            Kind::Disconnected => "Disconnected",
            Kind::Cancelled => "Cancelled",
            Kind::Changed => "Changed",
            Kind::Internal => "Internal",
        }
    }
}

/// An error with its kind, the argument it is about and a sentence for people.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct Error {
    /// What sort of thing went wrong.
    pub kind: Kind,
    /// The field of the configuration, as `disks[1].layers`; "" if none.
    pub argument: String,
    /// What was wrong and what would work.
    pub message: String,
}

impl Error {
    /// An error about `argument` ("" if it is about none).
    pub fn new(kind: Kind, argument: impl Into<String>, message: impl Into<String>) -> Error {
        Error {
            kind,
            argument: argument.into(),
            message: message.into(),
        }
    }

    /// A malformed or contradictory argument.
    pub fn invalid(argument: impl Into<String>, message: impl Into<String>) -> Error {
        Error::new(Kind::InvalidArgument, argument, message)
    }

    /// A call to the kernel that failed although its arguments were ours.
    pub fn kernel(what: &str, cause: impl fmt::Display) -> Error {
        Error::new(Kind::Unavailable, "", format!("{what}: {cause}"))
    }

    /// A bug of ours.
    pub fn internal(message: impl Into<String>) -> Error {
        Error::new(Kind::Internal, "", message)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.argument.is_empty() {
            write!(formatter, "{}: ", self.argument)?;
        }
        formatter.write_str(&self.message)
    }
}

/// The result of nearly everything here.
pub type Result<T> = std::result::Result<T, Error>;

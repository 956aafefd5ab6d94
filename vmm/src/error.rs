//! What can go wrong with a machine.

use std::io;
use std::path::PathBuf;

use godwit_core::MachineError;
use godwit_core::codec::CodecError;

use crate::config::ConfigError;

/// Why a machine could not do what it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// Its definition cannot be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// KVM refused something.
    #[error("{what}")]
    Kvm {
        /// What was asked of KVM.
        what: String,
        /// Its answer.
        source: kvm_ioctls::Error,
    },
    /// The host lacks something that the machine cannot do without.
    #[error("this host's KVM lacks {0}")]
    Missing(&'static str),
    /// The operating system refused something.
    #[error("{what}")]
    Os {
        /// What was tried.
        what: String,
        /// Its answer.
        source: io::Error,
    },
    /// Guest memory could not be set up or reached.
    #[error("{what}")]
    Memory {
        /// What was tried.
        what: String,
        /// Why not.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A kernel or initial RAM disk cannot be booted.
    #[error("cannot boot {path}: {reason}", path = path.display())]
    Boot {
        /// The file (or the name of a built-in image).
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// Saved state cannot be used.
    #[error("state section {kind}: {reason}")]
    State {
        /// The section.
        kind: String,
        /// Why not.
        reason: String,
    },
    /// A value could not be encoded or decoded.
    #[error("{what}")]
    Codec {
        /// What it was.
        what: &'static str,
        /// Why not.
        source: CodecError,
    },
    /// Somebody else uses the image of a disk: nothing was written to it.
    #[error("disk {disk}: {path} is in use: {how}", path = path.display())]
    ImageInUse {
        /// The disk's id.
        disk: String,
        /// Its image.
        path: PathBuf,
        /// How it is used, and what to do.
        how: String,
    },
    /// The machine is not in a state in which it could do that.
    #[error("{0}")]
    Status(String),
}

impl VmmError {
    /// An error of KVM while `what`.
    pub(crate) fn kvm(what: impl Into<String>) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |source| Self::Kvm { what: what.into(), source }
    }

    /// An error of the operating system while `what`.
    pub(crate) fn os(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Os { what: what.into(), source }
    }

    /// An error of guest memory while `what`.
    pub(crate) fn memory<E: std::error::Error + Send + Sync + 'static>(
        what: impl Into<String>,
    ) -> impl FnOnce(E) -> Self {
        move |source| Self::Memory { what: what.into(), source: Box::new(source) }
    }

    /// Section `kind` cannot be used.
    pub(crate) fn state(kind: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::State { kind: kind.into(), reason: reason.into() }
    }
}

impl From<VmmError> for MachineError {
    fn from(error: VmmError) -> Self {
        MachineError::new(chain(&error))
    }
}

/// An error and what caused it, on one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

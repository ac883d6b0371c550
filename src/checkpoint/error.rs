//! What can be wrong with a checkpoint file.

use std::path::{Path, PathBuf};

use crate::utils::atomic::WriteError;

/// A checkpoint that cannot be read or written; names the file.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// It cannot be read at all.
    #[error("{}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is damaged, or not what it should be.
    #[error("{}: {message}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong, and the way out.
        message: String,
    },
    /// It cannot be written; what was there before is as it was.
    #[error(transparent)]
    Write(#[from] WriteError),
}

impl CheckpointError {
    pub(super) fn content(path: &Path, message: impl Into<String>) -> Self {
        Self::Content { path: path.into(), message: message.into() }
    }
}

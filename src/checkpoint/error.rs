//! What can be wrong with a checkpoint file.

use std::path::{Path, PathBuf};

use super::WeightsShape;
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
    /// It holds weights alone, which do not tell the number of heads.
    #[error(
        "{}: holds weights alone ({} layers × {}, d_ff {}), which tell all of the model's shape but the number of heads: give --n_head",
        path.display(), shape.n_layer, shape.d_model, shape.d_ff
    )]
    Heads {
        /// The file.
        path: PathBuf,
        /// What they tell.
        shape: WeightsShape,
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

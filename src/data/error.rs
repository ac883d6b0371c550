//! What can go wrong with data, and the way out.

use std::io;
use std::path::{Path, PathBuf};

/// An error of reading, ordering or packing bytes; names the file or the option and says what would do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// The operating system refused.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        /// What was tried, as in "cannot ...".
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Nothing has this name.
    #[error(
        "{}: no such file or directory\n  name a directory of shard_*.bin files, a glob such as 'corpus/*.txt', \
         or one file; `bbt pack` makes shards from text files",
        path.display()
    )]
    Missing {
        /// As given.
        path: PathBuf,
    },
    /// A directory without shards.
    #[error(
        "{}: no shard_*.bin in this directory, which {holds}\n  name the directory of the shards, a glob for files of \
         other names, or make shards with `bbt pack`",
        path.display()
    )]
    NoShard {
        /// The directory.
        path: PathBuf,
        /// What is there instead, as in "which holds a.txt, b/".
        holds: String,
    },
    /// A glob that no file matches.
    #[error("{pattern}: no file matches\n  check the pattern, or make shards with `bbt pack`{}", bracket(pattern))]
    NoMatch {
        /// As given.
        pattern: String,
    },
    /// Not a glob.
    #[error("{pattern}: not a valid glob: {source}")]
    Pattern {
        /// As given.
        pattern: String,
        /// What and where.
        source: glob::PatternError,
    },
    /// A shard without bytes.
    #[error("{}: empty, but every shard must hold data\n  remove it, or make the shards anew with `bbt pack`", path.display())]
    EmptyShard {
        /// The shard.
        path: PathBuf,
    },
    /// A shard shorter than one window.
    #[error(
        "{}: {bytes} bytes, but one window at sequence length {seq_len} takes {}\n  \
         shorten the sequence (data.seq_len, data.curriculum), or pack more data",
        path.display(), *seq_len as u128 + 1
    )]
    ShortShard {
        /// The first such shard.
        path: PathBuf,
        /// Its size.
        bytes: u64,
        /// Bytes predicted per window.
        seq_len: usize,
    },
    /// An option out of its range.
    #[error("{option}: {message}")]
    Invalid {
        /// Its name.
        option: &'static str,
        /// What would do.
        message: String,
    },
    /// The loader cannot run.
    #[error("cannot start the data loader's thread: {0}")]
    Thread(#[source] io::Error),
    /// Packing would write over something.
    #[error("{}: exists already\n  choose another output directory, or allow overwriting", path.display())]
    Exists {
        /// The output directory.
        path: PathBuf,
    },
    /// Overwriting was allowed, but this is no earlier output.
    #[error(
        "{}: not a directory that `bbt pack` made (it has no valid {manifest}), so it is not overwritten\n  \
         choose another output directory, or remove this one first",
        path.display(), manifest = super::MANIFEST
    )]
    NotPacked {
        /// The output directory.
        path: PathBuf,
    },
    /// Nothing to pack.
    #[error(
        "{inputs}: no file with data{filter}\n  hidden files and directories are taken only where named themselves"
    )]
    NoDocuments {
        /// What was searched.
        inputs: String,
        /// The extensions wanted, as in " and extension .txt".
        filter: String,
    },
    /// A file was written to while it was packed.
    #[error("{}: changed while it was being packed\n  pack again when nothing writes to it", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// The progress callback asked to stop.
    #[error("interrupted: nothing was written")]
    Interrupted,
}

fn bracket(pattern: &str) -> &'static str {
    if pattern.contains('[') { "; [...] stands for one of the characters in it, [[] stands for a bracket" } else { "" }
}

impl DataError {
    /// For `map_err`: what was tried on which path.
    pub(super) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { action, path: path.into(), source }
    }

    pub(super) fn invalid(option: &'static str, message: impl Into<String>) -> Self {
        Self::Invalid { option, message: message.into() }
    }
}

//! A dataset of one file.

use std::path::PathBuf;

use super::{ByteDataset, DataError, Shard};

/// One file of bytes, memory-mapped.
#[derive(Debug)]
pub struct ByteStreamDataset {
    shard: [Shard; 1],
}

impl ByteStreamDataset {
    /// Opens the file at `path`.
    ///
    /// # Errors
    /// A file that is missing, unreadable or empty.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self, DataError> {
        Ok(Self { shard: [Shard::open(path)?] })
    }
}

impl ByteDataset for ByteStreamDataset {
    fn shards(&self) -> &[Shard] {
        &self.shard
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holds_the_files_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("text");
        std::fs::write(&path, b"abc").unwrap();
        let dataset = ByteStreamDataset::open(&path).unwrap();
        assert_eq!(dataset.shards().len(), 1);
        assert_eq!(dataset.shards()[0].bytes(), b"abc");
        assert_eq!(dataset.shards()[0].path(), path);
        assert_eq!(dataset.total_bytes(), 3);
        assert!(ByteStreamDataset::open(dir.path()).unwrap_err().to_string().contains("a directory, not a file"));
    }
}

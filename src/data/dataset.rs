//! What every dataset gives: memory-mapped shards of bytes.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;

use super::{ByteShardDataset, ByteStreamDataset, DataError, Windows};

/// A file of bytes, memory-mapped read-only: pages are read when they are first touched, and the system
/// drops them again when it needs the memory.
///
/// The file must not be truncated while it is open: touching a page that is gone ends the process (SIGBUS).
#[derive(Debug)]
pub struct Shard {
    path: PathBuf,
    map: Mmap,
}

impl Shard {
    /// Maps the file at `path`.
    ///
    /// # Errors
    /// A file that is missing, unreadable, empty, or no file.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self, DataError> {
        let path = path.into();
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(DataError::Missing { path }),
            Err(error) => return Err(DataError::io("open", &path)(error)),
        };
        let metadata = file.metadata().map_err(DataError::io("read its size", &path))?;
        if !metadata.is_file() {
            let error = io::Error::new(io::ErrorKind::InvalidInput, "not a regular file");
            return Err(DataError::io("map", &path)(error));
        }
        if metadata.len() == 0 {
            return Err(DataError::EmptyShard { path });
        }
        // SAFETY: the map is read-only and handed out as bytes, of which every value is valid. That no other
        // process truncates the file meanwhile cannot be enforced here; it is asked for in the type's docs.
        let map = unsafe { Mmap::map(&file) }.map_err(DataError::io("map", &path))?;
        Ok(Self { path, map })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its bytes: at least one.
    pub fn bytes(&self) -> &[u8] {
        &self.map
    }
}

/// A source of training or held-out bytes.
pub trait ByteDataset: Send + Sync {
    /// The shards, in file order: at least one. A shard's end is a document's end: no window crosses it.
    fn shards(&self) -> &[Shard];

    /// Number of bytes in all shards.
    fn total_bytes(&self) -> u64 {
        self.shards().iter().map(|shard| shard.bytes().len() as u64).sum()
    }

    /// What tells these bytes from others: how many there are, in how many shards, and a checksum of the length, the
    /// beginning and the end of each.
    fn fingerprint(&self) -> String {
        const SAMPLE: usize = 4096;
        let mut hash = crc32fast::Hasher::new();
        for shard in self.shards() {
            let bytes = shard.bytes();
            hash.update(&(bytes.len() as u64).to_le_bytes());
            hash.update(&bytes[..bytes.len().min(SAMPLE)]);
            hash.update(&bytes[bytes.len() - bytes.len().min(SAMPLE)..]);
        }
        format!("{}, {}, {:08x}", self.total_bytes(), self.shards().len(), hash.finalize())
    }

    /// The windows of `seq_len + 1` bytes that start every `seq_len` bytes: each byte but a shard's first
    /// (and at most `seq_len - 1` at its end) is predicted once.
    ///
    /// # Errors
    /// `seq_len` 0, or a shard shorter than a window.
    fn windows(&self, seq_len: usize) -> Result<Windows, DataError> {
        Windows::new(self.shards(), seq_len, seq_len)
    }

    /// The windows of `seq_len + 1` bytes that start at every byte.
    ///
    /// # Errors
    /// As [`ByteDataset::windows`].
    fn windows_at_every_byte(&self, seq_len: usize) -> Result<Windows, DataError> {
        Windows::new(self.shards(), seq_len, 1)
    }
}

/// Opens what `spec` names: a directory's `shard_*.bin` or the files that match a glob
/// ([`ByteShardDataset`]), or one file ([`ByteStreamDataset`]). What exists is never taken for a glob.
///
/// # Errors
/// Nothing of that name, no shard, an empty or unreadable one.
pub fn open(spec: &str) -> Result<Arc<dyn ByteDataset>, DataError> {
    let path = Path::new(spec);
    if path.is_dir() || (!path.exists() && spec.contains(['*', '?', '['])) {
        Ok(Arc::new(ByteShardDataset::open(spec)?))
    } else {
        Ok(Arc::new(ByteStreamDataset::open(spec)?))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn paths(spec: &Path) -> Result<Vec<String>, String> {
        let dataset = open(spec.to_str().unwrap()).map_err(|error| error.to_string())?;
        Ok(dataset.shards().iter().map(|s| s.path().file_name().unwrap().to_str().unwrap().into()).collect())
    }

    #[test]
    fn a_spec_is_a_directory_a_file_or_a_glob() {
        let dir = tempfile::tempdir().unwrap();
        for (name, bytes) in
            [("shard_1.bin", "one"), ("shard_0.bin", "zero"), ("b.txt", "b"), ("a.txt", "aa"), ("[x]", "x")]
        {
            fs::write(dir.path().join(name), bytes).unwrap();
        }
        assert_eq!(paths(dir.path()).unwrap(), ["shard_0.bin", "shard_1.bin"]);
        assert_eq!(paths(&dir.path().join("*.txt")).unwrap(), ["a.txt", "b.txt"]);
        assert_eq!(paths(&dir.path().join("a.txt")).unwrap(), ["a.txt"]);
        assert_eq!(paths(&dir.path().join("[x]")).unwrap(), ["[x]"]);

        let dataset = open(dir.path().to_str().unwrap()).unwrap();
        assert_eq!(dataset.total_bytes(), 7);
        assert_eq!(dataset.shards()[0].bytes(), b"zero");
    }

    #[test]
    fn errors_name_the_path_and_the_way_out() {
        let dir = tempfile::tempdir().unwrap();
        let missing = dir.path().join("nowhere");
        let message = paths(&missing).unwrap_err();
        assert!(message.starts_with(missing.to_str().unwrap()) && message.contains("bbt pack"), "{message}");

        let glob = dir.path().join("*.txt");
        let message = paths(&glob).unwrap_err();
        assert!(message.starts_with(glob.to_str().unwrap()) && message.contains("no file matches"), "{message}");
        let message = paths(&dir.path().join("[")).unwrap_err();
        assert!(message.contains("not a valid glob"), "{message}");

        let empty = dir.path().join("shard_00000.bin");
        fs::write(&empty, "").unwrap();
        for spec in [dir.path(), &empty] {
            let message = paths(spec).unwrap_err();
            assert!(message.starts_with(&format!("{}: empty", empty.display())), "{message}");
        }

        fs::write(&empty, [7; 64]).unwrap();
        let dataset = open(dir.path().to_str().unwrap()).unwrap();
        let message = dataset.windows(64).unwrap_err().to_string();
        assert!(message.starts_with(&format!("{}: 64 bytes", empty.display())), "{message}");
        assert!(message.contains("length 64 takes 65"), "{message}");
        assert_eq!(dataset.windows(63).unwrap().count(), 1);
        assert!(dataset.windows(0).unwrap_err().to_string().starts_with("seq_len"));
        assert!(dataset.windows(usize::MAX).is_err());
    }
}

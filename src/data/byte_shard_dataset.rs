//! A dataset of several files.

use std::fs;
use std::path::{Path, PathBuf};

use super::{ByteDataset, DataError, Shard};

/// Entries of a directory that an error message lists.
const LISTED: usize = 8;

/// Several files of bytes, memory-mapped, sorted by name (so `shard_10` comes before `shard_2`: pad numbers
/// with zeros).
#[derive(Debug)]
pub struct ByteShardDataset {
    shards: Vec<Shard>,
}

impl ByteShardDataset {
    /// Opens the files `shard_*.bin` of a directory, or the files that a glob matches.
    ///
    /// # Errors
    /// A directory that is missing or has no shard, a glob that is none or matches no file, a file that is
    /// unreadable or empty.
    pub fn open(spec: &str) -> Result<Self, DataError> {
        let path = Path::new(spec);
        let files = if path.is_dir() {
            shards_in(path)?
        } else if spec.contains(['*', '?', '[']) {
            matches(spec)?
        } else {
            return Err(DataError::Missing { path: path.into() });
        };
        let shards = files.into_iter().map(Shard::open).collect::<Result<_, _>>()?;
        Ok(Self { shards })
    }
}

impl ByteDataset for ByteShardDataset {
    fn shards(&self) -> &[Shard] {
        &self.shards
    }
}

/// The files `shard_*.bin` of a directory, sorted.
fn shards_in(dir: &Path) -> Result<Vec<PathBuf>, DataError> {
    let mut shards = Vec::new();
    let mut others = Vec::new();
    for entry in fs::read_dir(dir).map_err(DataError::io("list", dir))? {
        let path = entry.map_err(DataError::io("list", dir))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if path.is_dir() {
            others.push(format!("{name}/"));
        } else if name.starts_with("shard_") && name.ends_with(".bin") {
            shards.push(path);
        } else {
            others.push(name);
        }
    }
    if shards.is_empty() {
        others.sort();
        let holds = match others.len() {
            0 => "is empty".into(),
            n if n > LISTED => format!("holds {} and {} more", others[..LISTED].join(", "), n - LISTED),
            _ => format!("holds {}", others.join(", ")),
        };
        return Err(DataError::NoShard { path: dir.into(), holds });
    }
    shards.sort();
    Ok(shards)
}

/// A glob in which the directories that are there under just this name mean themselves, whatever brackets, stars and
/// question marks they have in it.
fn with_literal_directories(pattern: &str) -> String {
    let (mut globbed, mut end, mut literal) = (String::new(), 0, true);
    for part in pattern.split_inclusive('/') {
        end += part.len();
        literal = literal && part.ends_with('/') && Path::new(&pattern[..end]).is_dir();
        globbed.push_str(&if literal { glob::Pattern::escape(part) } else { part.into() });
    }
    globbed
}

/// The files that a glob matches, sorted.
fn matches(pattern: &str) -> Result<Vec<PathBuf>, DataError> {
    let found = glob::glob(&with_literal_directories(pattern))
        .map_err(|source| DataError::Pattern { pattern: pattern.into(), source })?;
    let mut files = Vec::new();
    for path in found {
        let path = path.map_err(|error| {
            let path = error.path().to_path_buf();
            DataError::io("list", &path)(error.into())
        })?;
        if !path.is_dir() {
            files.push(path);
        }
    }
    if files.is_empty() {
        return Err(DataError::NoMatch { pattern: pattern.into() });
    }
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_without_shards_says_what_it_holds() {
        let dir = tempfile::tempdir().unwrap();
        let message = || ByteShardDataset::open(dir.path().to_str().unwrap()).unwrap_err().to_string();
        assert!(message().contains("which is empty"), "{}", message());
        fs::create_dir(dir.path().join("train")).unwrap();
        fs::write(dir.path().join("notes.txt"), "x").unwrap();
        assert!(message().contains("no shard_*.bin") && message().contains("bbt pack"), "{}", message());
        assert!(message().contains("which holds notes.txt, train/\n"), "{}", message());
        for i in 0..20 {
            fs::write(dir.path().join(format!("a{i:02}")), "x").unwrap();
        }
        assert!(message().contains("a07 and 14 more"), "{}", message());
    }

    #[test]
    fn globs_pass_over_directories() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("a")).unwrap();
        fs::write(dir.path().join("b"), "bb").unwrap();
        let dataset = ByteShardDataset::open(dir.path().join("*").to_str().unwrap()).unwrap();
        assert_eq!(dataset.shards().len(), 1);
        assert!(ByteShardDataset::open("nowhere").unwrap_err().to_string().starts_with("nowhere: no such"));
    }
}

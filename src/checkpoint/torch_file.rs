//! The file format of `torch.save` since PyTorch 1.6: a zip archive, nothing compressed, of `data.pkl` (the
//! pickle), `data/KEY` (one storage each), `version` and `byteorder` (torch/serialization.py,
//! caffe2/serialize/inline_container.cc).
//!
//! Files are memory-mapped: tensors read from one are parts of it until they are copied.

use std::collections::HashMap;
use std::io::{self, Cursor, Write};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipArchive, ZipWriter};

use super::{CheckpointError, Storage, Value, pickle};
use crate::utils::atomic::write_atomic;
use crate::utils::mapped::MappedFile;

/// Part of a mapped file.
struct MapRange {
    map: Arc<MappedFile>,
    range: Range<usize>,
}

impl AsRef<[u8]> for MapRange {
    fn as_ref(&self) -> &[u8] {
        &self.map[self.range.clone()]
    }
}

/// Maps `path` into memory.
pub(super) fn map(path: &Path) -> Result<Arc<MappedFile>, CheckpointError> {
    // Checkpoints are replaced by renaming, never changed in place, by us and by PyTorch.
    let map = MappedFile::open(path).map_err(|source| CheckpointError::Read { path: path.into(), source })?;
    if map.is_empty() {
        return Err(CheckpointError::content(path, "is empty: no checkpoint"));
    }
    Ok(Arc::new(map))
}

/// How a file holds a checkpoint, as its first bytes say; its name does not count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// The zip archive of `torch.save`, or the pickle that it wrote before PyTorch 1.6.
    Torch,
    /// safetensors.
    Safetensors,
}

impl Format {
    /// The format of the file at `path`; none where it is neither.
    ///
    /// # Errors
    /// A file that is missing, empty, or no regular file.
    pub fn of(path: &Path) -> Result<Option<Self>, CheckpointError> {
        Ok(Self::of_bytes(&map(path)?))
    }

    fn of_bytes(bytes: &[u8]) -> Option<Self> {
        // The length of a JSON object, which follows.
        let header = bytes.first_chunk().map_or(0, |length| u64::from_le_bytes(*length));
        let is_header = (2..=100_000_000).contains(&header) && bytes.get(8) == Some(&b'{');
        match bytes {
            _ if bytes.starts_with(b"PK\x03\x04") || bytes.starts_with(LEGACY) => Some(Self::Torch),
            _ if is_header => Some(Self::Safetensors),
            _ => None,
        }
    }
}

/// What a file of `torch.save` before PyTorch 1.6 begins with: the pickled number 0x1950a86a20f9469cfc6c.
const LEGACY: &[u8] = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19";

/// An entry of the archive: where its bytes lie, and their checksum.
struct Entry {
    range: Range<usize>,
    crc32: u32,
}

/// Reads the value that `path` holds.
///
/// # Errors
/// A file that is missing, truncated, damaged (every entry used is checked against its CRC-32, unless the archive
/// was saved without), of the old format, or whose pickle asks for what plain `torch.load` does not load.
pub fn read(path: &Path) -> Result<Value, CheckpointError> {
    let error = |message: String| CheckpointError::content(path, message);
    let map = map(path)?;
    let (folder, entries) = entries(&map).map_err(error)?;
    // `torch.utils.serialization.config.save.compute_crc32 = False` leaves 0 in all of them.
    let checked = entries.values().any(|entry| entry.crc32 != 0);
    let bytes = |name: &str| match entries.get(&format!("{folder}{name}")) {
        None => Ok(None),
        Some(entry) => {
            let bytes = &map[entry.range.clone()];
            if checked && crc32fast::hash(bytes) != entry.crc32 {
                return Err(format!("is damaged: the checksum of {name} does not fit"));
            }
            Ok(Some((bytes, entry.range.clone())))
        }
    };
    match bytes("byteorder").map_err(error)? {
        None | Some((b"little", _)) => {}
        Some(_) => return Err(error("is big-endian: save it on a little-endian machine".into())),
    }
    let pickled = bytes("data.pkl").map_err(error)?;
    let (pickled, _) =
        pickled.ok_or_else(|| error("is a zip archive without data.pkl: no checkpoint of torch.save".into()))?;
    let mut storages: HashMap<String, Arc<Storage>> = HashMap::new();
    let mut load = |key: &str, dtype: super::Dtype, numel: usize| {
        if let Some(storage) = storages.get(key) {
            if storage.dtype() != dtype || storage.len() != numel {
                return Err(format!("storage {key} is used with two types"));
            }
            return Ok(storage.clone());
        }
        let (_, range) = bytes(&format!("data/{key}"))?.ok_or_else(|| format!("storage {key} is missing"))?;
        if numel.checked_mul(dtype.size()) != Some(range.len()) {
            return Err(format!("storage {key} should have {numel} elements, but has {} bytes", range.len()));
        }
        let storage = Storage::new(dtype, MapRange { map: map.clone(), range });
        storages.insert(key.into(), storage.clone());
        Ok(storage)
    };
    pickle::parse(pickled, &mut load).map_err(|e| error(e.to_string()))
}

/// The folder that a checkpoint's files lie in, with its slash, and all entries by name. Each lies within the
/// file, and none within another.
fn entries(map: &[u8]) -> Result<(String, HashMap<String, Entry>), String> {
    if map.starts_with(LEGACY) {
        return Err("is in PyTorch's old format (before 1.6): load it there and torch.save it again".into());
    }
    if !map.starts_with(b"PK") {
        return Err("is no checkpoint: it is not the zip archive that torch.save writes".into());
    }
    let damaged = |e: zip::result::ZipError| format!("is damaged or cut off: {e}");
    let mut archive = ZipArchive::new(Cursor::new(map)).map_err(damaged)?;
    let names = archive.file_names().collect::<Result<Vec<_>, _>>().map_err(damaged)?;
    // All files lie in one folder, which has the name that the file was first saved under; PyTorch, too,
    // takes it from the first.
    let folder = names.first().and_then(|name| name.split_once('/')).map(|(folder, _)| format!("{folder}/"));
    let folder = folder.unwrap_or_default();
    if names.iter().any(|name| *name == format!("{folder}constants.pkl")) {
        return Err("is a TorchScript archive: save a checkpoint with torch.save".into());
    }
    drop(names);
    // Otherwise a small file could have the same bytes checked any number of times.
    if archive.has_overlapping_files().map_err(damaged)? {
        return Err("is damaged: its entries overlap".into());
    }
    let mut entries = HashMap::new();
    for index in 0..archive.len() {
        let file = archive.by_index_raw(index).map_err(damaged)?;
        let name = file.name().map_err(damaged)?.into_owned();
        if file.compression() != CompressionMethod::Stored || file.encrypted() {
            return Err(format!("has compressed or encrypted entries ({name}), which torch.save never writes"));
        }
        let range = file.data_start().and_then(|start| {
            let start = usize::try_from(start).ok()?;
            let end = start.checked_add(usize::try_from(file.size()).ok()?)?;
            (file.size() == file.compressed_size() && end <= map.len()).then_some(start..end)
        });
        let range = range.ok_or_else(|| format!("is damaged or cut off: {name} reaches beyond its end"))?;
        let crc32 = file.crc32();
        drop(file);
        if entries.insert(name.clone(), Entry { range, crc32 }).is_some() {
            return Err(format!("is damaged: it has {name} twice"));
        }
    }
    Ok((folder, entries))
}

/// Writes `value` to `path`, whole or not at all. The same value gives the same bytes.
///
/// # Errors
/// The file system's.
pub fn write(path: &Path, value: &Value) -> Result<(), CheckpointError> {
    let (pickled, storages) = pickle::write(value).map_err(|e| CheckpointError::content(path, e.to_string()))?;
    let write = |file: &mut dyn WriteSeek| -> io::Result<()> {
        // As PyTorch aligns them: a storage can be mapped and used in place.
        let options = SimpleFileOptions::default()
            .compression_method(CompressionMethod::Stored)
            .last_modified_time(zip::DateTime::DEFAULT)
            .with_alignment(64);
        let mut zip = ZipWriter::new(file);
        let mut id = crc32fast::Hasher::new();
        let mut entry = |zip: &mut ZipWriter<_>, name: &str, bytes: &[u8]| -> io::Result<()> {
            id.update(bytes);
            let large = bytes.len() >= u32::MAX as usize;
            zip.start_file(format!("archive/{name}"), options.large_file(large))?;
            zip.write_all(bytes)
        };
        let entries = (|| {
            entry(&mut zip, "data.pkl", &pickled)?;
            entry(&mut zip, ".format_version", b"1")?;
            entry(&mut zip, ".storage_alignment", b"64")?;
            entry(&mut zip, "byteorder", b"little")?;
            for (key, storage) in storages.iter().enumerate() {
                entry(&mut zip, &format!("data/{key}"), storage.bytes())?;
            }
            entry(&mut zip, "version", b"3\n")
        })();
        let id = format!("{:040}", id.finalize());
        let entries = entries.and_then(|()| {
            zip.start_file("archive/.data/serialization_id", options)?;
            zip.write_all(id.as_bytes())
        });
        match entries {
            Ok(()) => {
                zip.finish()?;
                Ok(())
            }
            Err(error) => {
                // Dropped, it would try to finish the archive and print that it cannot.
                std::mem::forget(zip);
                Err(error)
            }
        }
    };
    Ok(write_atomic(path, |file| write(file))?)
}

trait WriteSeek: Write + io::Seek {}
impl<T: Write + io::Seek> WriteSeek for T {}

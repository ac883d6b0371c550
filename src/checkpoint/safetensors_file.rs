//! `.safetensors`, through the safetensors crate: named tensors and string metadata.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use safetensors::tensor::{SafeTensors, View};

use super::torch_file::map;
use super::{CheckpointError, Dtype, Storage, TensorData};
use crate::utils::atomic::write_bytes;
use crate::utils::mapped::MappedFile;

/// Tensors by name, and the file's metadata.
pub type Contents = (BTreeMap<String, TensorData>, HashMap<String, String>);

/// Reads all tensors of `path`; they are parts of the mapped file until they are copied.
///
/// # Errors
/// A file that is missing, damaged, or has tensors of a type that PyTorch's checkpoints do not.
pub fn read(path: &Path) -> Result<Contents, CheckpointError> {
    let error =
        |e: safetensors::SafeTensorError| CheckpointError::content(path, format!("is no whole safetensors file: {e}"));
    let map = map(path)?;
    let (_, metadata) = SafeTensors::read_metadata(&map).map_err(error)?;
    let tensors = SafeTensors::deserialize(&map).map_err(error)?;
    let mut all = BTreeMap::new();
    for (name, view) in tensors.tensors() {
        let dtype = dtype(view.dtype()).ok_or_else(|| {
            CheckpointError::content(path, format!("{name} has dtype {:?}, which bbt does not load", view.dtype()))
        })?;
        let storage = Storage::new(
            dtype,
            Part {
                map: map.clone(),
                at: view.data().as_ptr() as usize - map.as_ptr() as usize,
                len: view.data().len(),
            },
        );
        all.insert(name, TensorData::contiguous(storage, view.shape().to_vec()));
    }
    Ok((all, metadata.metadata().clone().unwrap_or_default()))
}

/// Part of a mapped file.
struct Part {
    map: std::sync::Arc<MappedFile>,
    at: usize,
    len: usize,
}

impl AsRef<[u8]> for Part {
    fn as_ref(&self) -> &[u8] {
        &self.map[self.at..self.at + self.len]
    }
}

/// Writes `tensors` and `metadata` to `path`, whole or not at all.
///
/// # Errors
/// The file system's.
pub fn write(
    path: &Path,
    tensors: &BTreeMap<String, TensorData>,
    metadata: HashMap<String, String>,
) -> Result<(), CheckpointError> {
    let views = tensors.iter().map(|(name, tensor)| (name.as_str(), TensorView(tensor)));
    let bytes = safetensors::serialize(views, Some(metadata))
        .map_err(|e| CheckpointError::content(path, format!("cannot be made: {e}")))?;
    Ok(write_bytes(path, &bytes)?)
}

struct TensorView<'a>(&'a TensorData);

impl View for TensorView<'_> {
    fn dtype(&self) -> safetensors::Dtype {
        match self.0.dtype() {
            Dtype::F32 => safetensors::Dtype::F32,
            Dtype::F64 => safetensors::Dtype::F64,
            Dtype::F16 => safetensors::Dtype::F16,
            Dtype::BF16 => safetensors::Dtype::BF16,
            Dtype::I64 => safetensors::Dtype::I64,
            Dtype::I32 => safetensors::Dtype::I32,
            Dtype::I16 => safetensors::Dtype::I16,
            Dtype::I8 => safetensors::Dtype::I8,
            Dtype::U8 => safetensors::Dtype::U8,
            Dtype::Bool => safetensors::Dtype::BOOL,
        }
    }

    fn shape(&self) -> &[usize] {
        &self.0.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        self.0.contiguous_bytes()
    }

    fn data_len(&self) -> usize {
        self.0.numel() * self.0.dtype().size()
    }
}

fn dtype(theirs: safetensors::Dtype) -> Option<Dtype> {
    Some(match theirs {
        safetensors::Dtype::F32 => Dtype::F32,
        safetensors::Dtype::F64 => Dtype::F64,
        safetensors::Dtype::F16 => Dtype::F16,
        safetensors::Dtype::BF16 => Dtype::BF16,
        safetensors::Dtype::I64 => Dtype::I64,
        safetensors::Dtype::I32 => Dtype::I32,
        safetensors::Dtype::I16 => Dtype::I16,
        safetensors::Dtype::I8 => Dtype::I8,
        safetensors::Dtype::U8 => Dtype::U8,
        safetensors::Dtype::BOOL => Dtype::Bool,
        _ => return None,
    })
}

//! The data model of a checkpoint: what a pickle of plain containers and tensors holds.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

/// Element type of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dtype {
    /// float32
    F32,
    /// float64
    F64,
    /// float16
    F16,
    /// bfloat16
    BF16,
    /// int64
    I64,
    /// int32
    I32,
    /// int16
    I16,
    /// int8
    I8,
    /// uint8
    U8,
    /// bool, one byte each
    Bool,
}

impl Dtype {
    /// Every dtype.
    pub const ALL: [Self; 10] =
        [Self::F32, Self::F64, Self::F16, Self::BF16, Self::I64, Self::I32, Self::I16, Self::I8, Self::U8, Self::Bool];

    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Self::F64 | Self::I64 => 8,
            Self::F32 | Self::I32 => 4,
            Self::F16 | Self::BF16 | Self::I16 => 2,
            Self::I8 | Self::U8 | Self::Bool => 1,
        }
    }

    /// The class in module `torch` that stands for a storage of this dtype.
    pub fn storage_class(self) -> &'static str {
        match self {
            Self::F32 => "FloatStorage",
            Self::F64 => "DoubleStorage",
            Self::F16 => "HalfStorage",
            Self::BF16 => "BFloat16Storage",
            Self::I64 => "LongStorage",
            Self::I32 => "IntStorage",
            Self::I16 => "ShortStorage",
            Self::I8 => "CharStorage",
            Self::U8 => "ByteStorage",
            Self::Bool => "BoolStorage",
        }
    }
}

/// The elements of one or more tensors, in row-major order and little-endian, wherever they lie: in a
/// memory-mapped file or in a live tensor.
pub struct Storage {
    dtype: Dtype,
    bytes: Box<dyn AsRef<[u8]> + Send + Sync>,
}

impl Storage {
    /// Elements of type `dtype`, whose bytes are those of `bytes`.
    pub fn new(dtype: Dtype, bytes: impl AsRef<[u8]> + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Self { dtype, bytes: Box::new(bytes) })
    }

    /// Their type.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Their bytes.
    pub fn bytes(&self) -> &[u8] {
        self.bytes.as_ref().as_ref()
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.bytes().len() / self.dtype.size()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl fmt::Debug for Storage {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "Storage({:?}, {})", self.dtype, self.len())
    }
}

/// A view of a storage. Two tensors over one storage (tied weights) are written and read back as such.
#[derive(Debug, Clone)]
pub struct TensorData {
    /// The elements.
    pub storage: Arc<Storage>,
    /// Index of the first.
    pub offset: usize,
    /// Size of each dimension.
    pub shape: Vec<usize>,
    /// Distance of neighbours in each dimension, in elements.
    pub strides: Vec<usize>,
    /// Whether it is a parameter that is trained.
    pub requires_grad: bool,
}

impl TensorData {
    /// A view of all of `storage`, row by row.
    pub fn contiguous(storage: Arc<Storage>, shape: Vec<usize>) -> Self {
        let strides = contiguous_strides(&shape);
        Self { storage, offset: 0, shape, strides, requires_grad: false }
    }

    /// A view, if all of it lies in the storage and no element is in it twice as a whole (a view larger
    /// than its storage could ask for any amount of memory).
    pub fn view(storage: Arc<Storage>, offset: usize, shape: Vec<usize>, strides: Vec<usize>) -> Option<Self> {
        if shape.len() != strides.len() || shape.len() > 64 {
            return None;
        }
        let numel = shape.iter().try_fold(1usize, |n, &size| n.checked_mul(size))?;
        let last = shape
            .iter()
            .zip(&strides)
            .try_fold(offset, |last, (&size, &stride)| last.checked_add(size.saturating_sub(1).checked_mul(stride)?))?;
        let inside = if numel == 0 { offset <= storage.len() } else { last < storage.len() };
        (inside && numel <= storage.len()).then_some(Self { storage, offset, shape, strides, requires_grad: false })
    }

    /// Whether such a view lies within its storage, but counts elements more than once (`tensor.expand`).
    pub(super) fn is_expanded(storage: &Storage, offset: usize, shape: &[usize], strides: &[usize]) -> bool {
        let last = shape
            .iter()
            .zip(strides)
            .try_fold(offset, |last, (&size, &stride)| last.checked_add(size.saturating_sub(1).checked_mul(stride)?));
        shape.len() == strides.len() && strides.contains(&0) && last.is_some_and(|last| last < storage.len())
    }

    /// Element type.
    pub fn dtype(&self) -> Dtype {
        self.storage.dtype
    }

    /// Number of elements.
    pub fn numel(&self) -> usize {
        self.shape.iter().product()
    }

    /// The one element of a tensor of one element, as an int or a float.
    fn item(&self) -> Option<Value> {
        if self.numel() != 1 {
            return None;
        }
        let bytes = self.contiguous_bytes();
        let bytes = bytes.as_ref();
        Some(match self.dtype() {
            Dtype::F32 => Value::Float(f32::from_le_bytes(bytes.try_into().ok()?).into()),
            Dtype::F64 => Value::Float(f64::from_le_bytes(bytes.try_into().ok()?)),
            Dtype::BF16 => {
                let bits = u16::from_le_bytes(bytes.try_into().ok()?);
                Value::Float(f32::from_bits(u32::from(bits) << 16).into())
            }
            Dtype::I64 => Value::Int(i64::from_le_bytes(bytes.try_into().ok()?)),
            Dtype::I32 => Value::Int(i32::from_le_bytes(bytes.try_into().ok()?).into()),
            Dtype::I16 => Value::Int(i16::from_le_bytes(bytes.try_into().ok()?).into()),
            Dtype::I8 => Value::Int(i8::from_le_bytes(bytes.try_into().ok()?).into()),
            Dtype::U8 => Value::Int(bytes[0].into()),
            Dtype::F16 | Dtype::Bool => return None,
        })
    }

    /// The elements' bytes row by row, copied only where they do not lie so.
    pub fn contiguous_bytes(&self) -> Cow<'_, [u8]> {
        let (size, numel, bytes) = (self.dtype().size(), self.numel(), self.storage.bytes());
        // Strides of dimensions of size 1 (or of no elements) say nothing.
        let rows = contiguous_strides(&self.shape);
        let plain = numel == 0
            || self.shape.iter().zip(self.strides.iter().zip(&rows)).all(|(&n, (have, want))| n == 1 || have == want);
        if plain {
            return Cow::Borrowed(&bytes[self.offset * size..(self.offset + numel) * size]);
        }
        let mut out = Vec::with_capacity(numel * size);
        let mut index = vec![0; self.shape.len()];
        for _ in 0..numel {
            let at = self.offset + index.iter().zip(&self.strides).map(|(i, s)| i * s).sum::<usize>();
            out.extend_from_slice(&bytes[at * size..(at + 1) * size]);
            for (i, &n) in index.iter_mut().zip(&self.shape).rev() {
                *i += 1;
                if *i < n {
                    break;
                }
                *i = 0;
            }
        }
        Cow::Owned(out)
    }
}

impl PartialEq for TensorData {
    /// The same dtype, shape and bytes.
    fn eq(&self, other: &Self) -> bool {
        self.dtype() == other.dtype()
            && self.shape == other.shape
            && self.contiguous_bytes() == other.contiguous_bytes()
    }
}

fn contiguous_strides(shape: &[usize]) -> Vec<usize> {
    let mut strides = vec![1usize; shape.len()];
    for i in (1..shape.len()).rev() {
        // Where one size is 0, the others may multiply to anything: such strides say nothing.
        strides[i - 1] = strides[i].saturating_mul(shape[i].max(1));
    }
    strides
}

/// A value in a checkpoint.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// None
    None,
    /// bool
    Bool(bool),
    /// int, as far as 64 bits hold it
    Int(i64),
    /// float
    Float(f64),
    /// str; also what stands for a torch.dtype or torch.device
    Str(String),
    /// bytes
    Bytes(Vec<u8>),
    /// list
    List(Vec<Value>),
    /// tuple; also torch.Size
    Tuple(Vec<Value>),
    /// dict, in insertion order
    Dict(Vec<(Value, Value)>),
    /// collections.OrderedDict with the attributes set on it, as a state_dict has `_metadata`
    OrderedDict {
        /// In order.
        items: Vec<(Value, Value)>,
        /// By name.
        attributes: Vec<(String, Value)>,
    },
    /// torch.Tensor
    Tensor(TensorData),
    /// A value of a type that bbt has no use for (a set, a sparse tensor, an int of more than 64 bits): its type in
    /// words. It can be passed over, but not written.
    Opaque(&'static str),
}

impl Value {
    /// The entries of a dict or OrderedDict; none of anything else.
    pub fn entries(&self) -> &[(Value, Value)] {
        match self {
            Self::Dict(entries) | Self::OrderedDict { items: entries, .. } => entries,
            _ => &[],
        }
    }

    /// The elements of a list or tuple; none of anything else.
    pub fn elements(&self) -> &[Value] {
        match self {
            Self::List(elements) | Self::Tuple(elements) => elements,
            _ => &[],
        }
    }

    /// The value under a string key of a dict.
    pub fn get(&self, key: &str) -> Option<&Value> {
        // Of equal keys the last counts, as in Python.
        self.entries().iter().rev().find(|(k, _)| k.as_str() == Some(key)).map(|(_, value)| value)
    }

    /// The same, to change it.
    pub fn get_mut(&mut self, key: &str) -> Option<&mut Value> {
        let (Self::Dict(entries) | Self::OrderedDict { items: entries, .. }) = self else { return None };
        entries.iter_mut().rev().find(|(k, _)| k.as_str() == Some(key)).map(|(_, value)| value)
    }

    /// A str.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Self::Str(text) => Some(text),
            _ => None,
        }
    }

    /// An int.
    pub fn as_i64(&self) -> Option<i64> {
        match self {
            Self::Int(number) => Some(*number),
            _ => None,
        }
    }

    /// A float, or an int as one.
    pub fn as_f64(&self) -> Option<f64> {
        match self {
            Self::Float(number) => Some(*number),
            Self::Int(number) => Some(*number as f64),
            _ => None,
        }
    }

    /// A bool.
    pub fn as_bool(&self) -> Option<bool> {
        match self {
            Self::Bool(value) => Some(*value),
            _ => None,
        }
    }

    /// A whole number, however it was saved: an int, a float without a fraction, or a tensor of one such element.
    pub fn whole_number(&self) -> Option<i64> {
        match self {
            Self::Int(number) => Some(*number),
            Self::Tensor(tensor) => tensor.item()?.whole_number(),
            // Beyond 2^53 floats do not tell neighbours apart.
            Self::Float(x) if x.fract() == 0.0 && x.abs() <= (1u64 << 53) as f64 => Some(*x as i64),
            _ => None,
        }
    }

    /// A number, however it was saved: a float, an int, or a tensor of one element.
    pub fn number(&self) -> Option<f64> {
        match self {
            Self::Tensor(tensor) => tensor.item()?.as_f64(),
            _ => self.as_f64(),
        }
    }

    /// Its type, as Python calls it.
    pub fn type_name(&self) -> &'static str {
        match self {
            Self::None => "None",
            Self::Bool(_) => "bool",
            Self::Int(_) => "int",
            Self::Float(_) => "float",
            Self::Str(_) => "str",
            Self::Bytes(_) => "bytes",
            Self::List(_) => "list",
            Self::Tuple(_) => "tuple",
            Self::Dict(_) => "dict",
            Self::OrderedDict { .. } => "OrderedDict",
            Self::Tensor(_) => "tensor",
            Self::Opaque(name) => name,
        }
    }

    /// Whether this is None.
    pub fn is_none(&self) -> bool {
        matches!(self, Self::None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_beside_a_zero_may_multiply_to_anything() {
        // A header of a few bytes can ask for this.
        let shape = vec![0, 1 << 62, 8];
        let tensor = TensorData::contiguous(Storage::new(Dtype::F32, vec![]), shape.clone());
        assert_eq!(tensor.strides, [usize::MAX, 8, 1]);
        let view = TensorData::view(tensor.storage.clone(), 0, shape, vec![0; 3]).expect("no element lies outside");
        assert!(view.contiguous_bytes().is_empty());
    }
}

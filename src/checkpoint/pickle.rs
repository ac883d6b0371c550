//! Python's pickle, as far as `torch.save` uses it (Lib/pickletools.py describes every opcode).
//!
//! Reading is an allow-list: a pickle is a program, and the only things this machine can do are make plain
//! containers and tensors. The list is that of `torch.load` with `weights_only` (torch/_weights_only_unpickler.py);
//! values on it that bbt has no use for become [`Value::Opaque`], which says what they were. Any other global is
//! refused by name; nothing is executed. Memory and time are bounded by the length of the input. Writing is
//! protocol 2, as `torch.save` has it.

use std::collections::HashMap;
use std::sync::Arc;

use super::{Dtype, Storage, TensorData, Value};

/// A pickle that is refused.
#[derive(Debug, thiserror::Error)]
pub enum PickleError {
    /// It names a global that is not on the list.
    #[error(
        "it asks for `{0}`, which bbt does not load: only what plain `torch.load` reads is read (save numbers, strings, containers and tensors, not objects)"
    )]
    Global(String),
    /// It does not parse.
    #[error("its pickle is damaged at byte {at}: {message}")]
    Damaged {
        /// Where.
        at: usize,
        /// What is wrong.
        message: String,
    },
    /// A tensor's bytes cannot be had.
    #[error("{0}")]
    Storage(String),
}

/// Where a pickle's tensors have their elements: called with key, dtype and number of elements.
pub type LoadStorage<'a> = dyn FnMut(&str, Dtype, usize) -> Result<Arc<Storage>, String> + 'a;

/// Containers may nest this deep.
const MAX_DEPTH: usize = 64;
/// The longest name of a device and key of a storage: "cuda:0" and "17" in earnest.
const MAX_NAME: usize = 64;
/// The most dimensions of a tensor, as PyTorch has it.
const MAX_DIMENSIONS: usize = 64;

/// Index of a node in the machine's arena.
type Id = usize;

#[derive(Clone, Copy, PartialEq)]
enum Global {
    OrderedDict,
    RebuildTensor,
    RebuildParameter,
    Size,
    Device,
    Encode,
    Storage(Dtype),
    /// A storage of a type that bbt has no use for.
    OpaqueStorage,
    /// `torch._tensor._rebuild_from_type_v2`: calls another function of these, then sets attributes.
    FromType,
    /// The class `torch.Tensor`.
    TensorClass,
    /// A class or function whose instances or results bbt has no use for, in words.
    Opaque(&'static str),
}

/// What is on the machine's stack. Containers hold indices, so that a value in the memo costs nothing to
/// use again and can still be filled after it was memoised.
enum Node {
    Plain(Value),
    List(Vec<Id>),
    Tuple(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    /// Its attributes are the dict that BUILD set: shared, since a copy could be asked for again and again.
    OrderedDict {
        items: Vec<(Id, Id)>,
        attributes: Option<Id>,
    },
    Global(Global),
    Storage(Arc<Storage>),
    OpaqueStorage,
}

struct Machine<'a, 'b> {
    input: &'a [u8],
    at: usize,
    nodes: Vec<Node>,
    stack: Vec<Id>,
    marks: Vec<usize>,
    memo: HashMap<u64, Id>,
    /// How many more values there may be, a long one counting as several.
    budget: usize,
    load: &'a mut LoadStorage<'b>,
}

/// Reads the value that `input` pickles.
///
/// # Errors
/// A global that is not allowed, damage, a storage that `load` refuses.
pub fn parse(input: &[u8], load: &mut LoadStorage) -> Result<Value, PickleError> {
    // A value costs at least a byte of pickle, and is rarely used again: what unfolds to many times the
    // input's length was made to.
    let budget = input.len().saturating_mul(4).saturating_add(1024);
    let (nodes, stack, marks, memo) = (vec![], vec![], vec![], HashMap::new());
    let mut machine = Machine { input, at: 0, nodes, stack, marks, memo, budget, load };
    let result = machine.run()?;
    let mut budget = machine.budget;
    machine.value(result, 0, &mut budget)
}

impl Machine<'_, '_> {
    fn damaged(&self, message: impl Into<String>) -> PickleError {
        PickleError::Damaged { at: self.at, message: message.into() }
    }

    fn take(&mut self, n: usize) -> Result<&[u8], PickleError> {
        let end = self.at.checked_add(n).filter(|&end| end <= self.input.len());
        let end = end.ok_or_else(|| self.damaged("it ends too early"))?;
        let bytes = &self.input[self.at..end];
        self.at = end;
        Ok(bytes)
    }

    /// A little-endian unsigned number of `n` up to 8 bytes.
    fn number(&mut self, n: usize) -> Result<u64, PickleError> {
        Ok(self.take(n)?.iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte)))
    }

    /// A text or byte string behind a length of `n` bytes.
    fn counted(&mut self, n: usize) -> Result<&[u8], PickleError> {
        let length = self.number(n)?;
        self.take(usize::try_from(length).unwrap_or(usize::MAX))
    }

    /// Python's strings may hold lone surrogates, which are not UTF-8.
    fn text(&mut self, n: usize) -> Result<Value, PickleError> {
        let text = std::str::from_utf8(self.counted(n)?).map(String::from);
        Ok(text.map_or(Value::Opaque("str with lone surrogates"), Value::Str))
    }

    fn line(&mut self) -> Result<String, PickleError> {
        let length = self.input[self.at..].iter().position(|&b| b == b'\n');
        let length = length.ok_or_else(|| self.damaged("it ends too early"))?;
        let text = std::str::from_utf8(self.take(length)?).map(String::from);
        self.at += 1;
        text.map_err(|_| self.damaged("a name is not UTF-8"))
    }

    fn push(&mut self, node: Node) {
        self.nodes.push(node);
        self.stack.push(self.nodes.len() - 1);
    }

    fn plain(&mut self, value: Value) {
        self.push(Node::Plain(value));
    }

    fn pop(&mut self) -> Result<Id, PickleError> {
        // What lies below a mark belongs to somebody else.
        if self.stack.len() <= self.marks.last().copied().unwrap_or(0) {
            return Err(self.damaged("its stack is empty"));
        }
        self.stack.pop().ok_or_else(|| self.damaged("its stack is empty"))
    }

    fn top(&self) -> Result<Id, PickleError> {
        self.stack.last().copied().ok_or_else(|| self.damaged("its stack is empty"))
    }

    fn pop_to_mark(&mut self) -> Result<Vec<Id>, PickleError> {
        let mark = self.marks.pop().ok_or_else(|| self.damaged("a mark is missing"))?;
        Ok(self.stack.split_off(mark))
    }

    fn pairs(&self, ids: &[Id]) -> Result<Vec<(Id, Id)>, PickleError> {
        if !ids.len().is_multiple_of(2) {
            return Err(self.damaged("a key has no value"));
        }
        Ok(ids.chunks(2).map(|pair| (pair[0], pair[1])).collect())
    }

    fn append(&mut self, new: Vec<Id>) -> Result<(), PickleError> {
        let list = self.top()?;
        match &mut self.nodes[list] {
            Node::List(elements) => elements.extend(new),
            // ADDITEMS of a set.
            Node::Plain(Value::Opaque(_)) => {}
            _ => return Err(self.damaged("something is appended to what is no list")),
        }
        Ok(())
    }

    fn set(&mut self, new: Vec<(Id, Id)>) -> Result<(), PickleError> {
        let dict = self.top()?;
        match &mut self.nodes[dict] {
            Node::Dict(items) | Node::OrderedDict { items, .. } => items.extend(new),
            Node::Plain(Value::Opaque(_)) => {}
            _ => return Err(self.damaged("an item is set on what is no dict")),
        }
        Ok(())
    }

    fn remember(&mut self, key: u64) -> Result<(), PickleError> {
        let id = self.top()?;
        self.memo.insert(key, id);
        Ok(())
    }

    fn recall(&mut self, key: u64) -> Result<(), PickleError> {
        let id = *self.memo.get(&key).ok_or_else(|| self.damaged(format!("memo {key} is empty")))?;
        self.stack.push(id);
        Ok(())
    }

    fn run(&mut self) -> Result<Id, PickleError> {
        loop {
            let opcode = self.take(1)?[0];
            match opcode {
                0x80 => {
                    let protocol = self.number(1)?;
                    if protocol > 5 {
                        return Err(self.damaged(format!("protocol {protocol} is unknown")));
                    }
                }
                0x95 => drop(self.number(8)?), // FRAME: a hint for buffered readers
                b'.' => return self.pop(),
                b'(' => self.marks.push(self.stack.len()),
                b'0' => drop(self.pop()?),
                b'1' => drop(self.pop_to_mark()?),
                b'2' => {
                    let id = self.top()?;
                    self.stack.push(id);
                }
                b'N' => self.plain(Value::None),
                0x88 => self.plain(Value::Bool(true)),
                0x89 => self.plain(Value::Bool(false)),
                b'K' => {
                    let n = self.number(1)?;
                    self.plain(Value::Int(n as i64));
                }
                b'M' => {
                    let n = self.number(2)?;
                    self.plain(Value::Int(n as i64));
                }
                b'J' => {
                    let n = self.number(4)?;
                    self.plain(Value::Int(i64::from(n as u32 as i32)));
                }
                0x8a => {
                    let n = self.number(1)? as usize;
                    if n > 8 {
                        self.take(n)?;
                        self.plain(Value::Opaque("int of more than 64 bits"));
                        continue;
                    }
                    let unused = 64 - 8 * n as u32;
                    let number = if n == 0 { 0 } else { (self.number(n)? << unused) as i64 >> unused };
                    self.plain(Value::Int(number));
                }
                b'G' => {
                    let bits = self.number(8)?.swap_bytes();
                    self.plain(Value::Float(f64::from_bits(bits)));
                }
                b'X' | b'U' | 0x8c | 0x8d => {
                    let text = self.text(match opcode {
                        b'X' => 4,
                        b'U' | 0x8c => 1,
                        _ => 8,
                    })?;
                    self.plain(text);
                }
                b'B' | b'C' | 0x8e => {
                    let bytes = self.counted(if opcode == b'B' {
                        4
                    } else if opcode == b'C' {
                        1
                    } else {
                        8
                    })?;
                    let bytes = bytes.to_vec();
                    self.plain(Value::Bytes(bytes));
                }
                b']' => self.push(Node::List(vec![])),
                b'l' => {
                    let elements = self.pop_to_mark()?;
                    self.push(Node::List(elements));
                }
                b'a' => {
                    let element = self.pop()?;
                    self.append(vec![element])?;
                }
                0x8f => self.plain(Value::Opaque("set")),
                b'e' | 0x90 => {
                    let elements = self.pop_to_mark()?;
                    self.append(elements)?;
                }
                b')' => self.push(Node::Tuple(vec![])),
                b't' => {
                    let elements = self.pop_to_mark()?;
                    self.push(Node::Tuple(elements));
                }
                0x85..=0x87 => {
                    let n = usize::from(opcode - 0x84);
                    let mut elements = (0..n).map(|_| self.pop()).collect::<Result<Vec<_>, _>>()?;
                    elements.reverse();
                    self.push(Node::Tuple(elements));
                }
                b'}' => self.push(Node::Dict(vec![])),
                b'd' => {
                    let ids = self.pop_to_mark()?;
                    let items = self.pairs(&ids)?;
                    self.push(Node::Dict(items));
                }
                b's' => {
                    let (value, key) = (self.pop()?, self.pop()?);
                    self.set(vec![(key, value)])?;
                }
                b'u' => {
                    let ids = self.pop_to_mark()?;
                    let items = self.pairs(&ids)?;
                    self.set(items)?;
                }
                b'q' | b'r' => {
                    let key = self.number(if opcode == b'q' { 1 } else { 4 })?;
                    self.remember(key)?;
                }
                0x94 => self.remember(self.memo.len() as u64)?,
                b'h' | b'j' => {
                    let key = self.number(if opcode == b'h' { 1 } else { 4 })?;
                    self.recall(key)?;
                }
                b'c' => {
                    let (module, name) = (self.line()?, self.line()?);
                    let node = global(&module, &name)?;
                    self.push(node);
                }
                0x93 => {
                    let (name, module) = (self.pop()?, self.pop()?);
                    let node = global(self.string(module)?, self.string(name)?)?;
                    self.push(node);
                }
                b'Q' => {
                    let id = self.pop()?;
                    let storage = self.storage(id)?;
                    self.push(storage);
                }
                // NEWOBJ makes an object of a class where REDUCE calls it, which for those of the list is the same.
                b'R' | 0x81 => {
                    let (arguments, callable) = (self.pop()?, self.pop()?);
                    self.reduce(callable, arguments)?;
                }
                b'b' => {
                    let (state, target) = (self.pop()?, self.top()?);
                    self.build(target, state)?;
                }
                _ => return Err(self.damaged(format!("opcode 0x{opcode:02x} is none that a checkpoint has"))),
            }
        }
    }

    fn string(&self, id: Id) -> Result<&str, PickleError> {
        match &self.nodes[id] {
            Node::Plain(Value::Str(text)) => Ok(text),
            _ => Err(self.damaged("a string is expected")),
        }
    }

    /// The string `id`, if it is no longer than any name in earnest.
    fn name(&self, id: Id) -> Result<String, PickleError> {
        match self.string(id)? {
            text if text.len() <= MAX_NAME => Ok(text.into()),
            _ => Err(self.damaged("a name is too long")),
        }
    }

    fn size(&self, id: Id) -> Result<usize, PickleError> {
        match &self.nodes[id] {
            Node::Plain(Value::Int(n)) => usize::try_from(*n).map_err(|_| self.damaged("a size is negative")),
            _ => Err(self.damaged("a number is expected")),
        }
    }

    fn sizes(&self, id: Id) -> Result<Vec<usize>, PickleError> {
        match self.tuple(id)? {
            sizes if sizes.len() > MAX_DIMENSIONS => Err(self.damaged("a tensor has too many dimensions")),
            sizes => sizes.iter().map(|&id| self.size(id)).collect(),
        }
    }

    fn tuple(&self, id: Id) -> Result<&[Id], PickleError> {
        match &self.nodes[id] {
            Node::Tuple(elements) => Ok(elements),
            _ => Err(self.damaged("a tuple is expected")),
        }
    }

    /// The storage that `('storage', torch.FloatStorage, key, location, numel)` stands for.
    fn storage(&mut self, id: Id) -> Result<Node, PickleError> {
        let &[tag, class, key, _location, numel] = self.tuple(id)? else {
            return Err(self.damaged("a persistent id is no storage"));
        };
        if self.string(tag)? != "storage" {
            return Err(self.damaged("a persistent id is no storage"));
        }
        let dtype = match self.nodes[class] {
            Node::Global(Global::Storage(dtype)) => dtype,
            Node::Global(Global::OpaqueStorage) => return Ok(Node::OpaqueStorage),
            _ => return Err(self.damaged("a storage has no class")),
        };
        let (key, numel) = (self.name(key)?, self.size(numel)?);
        (self.load)(&key, dtype, numel).map(Node::Storage).map_err(PickleError::Storage)
    }

    /// Pushes what `callable` gives for `arguments`.
    fn reduce(&mut self, callable: Id, arguments: Id) -> Result<(), PickleError> {
        let Node::Global(callable) = self.nodes[callable] else {
            return Err(self.damaged("it calls what is no function"));
        };
        let value = match (callable, self.tuple(arguments)?) {
            (Global::OrderedDict, []) => {
                self.push(Node::OrderedDict { items: vec![], attributes: None });
                return Ok(());
            }
            (Global::Size, &[elements]) => {
                self.tuple(elements)?;
                self.stack.push(elements);
                return Ok(());
            }
            (Global::Device, &[name]) => Value::Str(self.name(name)?),
            (Global::Device, &[name, index]) => Value::Str(format!("{}:{}", self.name(name)?, self.size(index)?)),
            (Global::Encode, &[text, encoding]) if self.string(encoding)? == "latin1" => {
                let text = self.string(text)?;
                let bytes = text.chars().map(u8::try_from).collect::<Result<Vec<_>, _>>();
                let bytes = bytes.map_err(|_| self.damaged("a byte string has characters that are no bytes"))?;
                self.budget = self.rest_of(self.budget, bytes.len())?;
                Value::Bytes(bytes)
            }
            (Global::RebuildTensor, &[storage, offset, shape, strides, ref rest @ ..]) => {
                self.tensor(storage, offset, [shape, strides], rest)?
            }
            (Global::RebuildParameter, &[data, requires_grad, ..]) => match &self.nodes[data] {
                Node::Plain(Value::Tensor(data)) => {
                    let requires_grad = matches!(self.nodes[requires_grad], Node::Plain(Value::Bool(true)));
                    Value::Tensor(TensorData { requires_grad, ..data.clone() })
                }
                Node::Plain(Value::Opaque(name)) => Value::Opaque(name),
                _ => return Err(self.damaged("a parameter has no tensor")),
            },
            // Of a class of tensors other than torch's own nothing is known.
            (Global::FromType, &[function, class, arguments, ..]) => {
                return match (&self.nodes[function], &self.nodes[class]) {
                    (
                        Node::Global(Global::RebuildTensor | Global::RebuildParameter),
                        Node::Global(Global::TensorClass),
                    ) => self.reduce(function, arguments),
                    _ => {
                        self.plain(Value::Opaque("tensor of another class"));
                        Ok(())
                    }
                };
            }
            (Global::Opaque(name), _) => Value::Opaque(name),
            (Global::TensorClass, _) => Value::Opaque("tensor"),
            _ => return Err(self.damaged("a function has other arguments than it takes")),
        };
        self.plain(value);
        Ok(())
    }

    /// `_rebuild_tensor` and its second version; `rest` is requires_grad, hooks and the metadata.
    fn tensor(&self, storage: Id, offset: Id, [shape, strides]: [Id; 2], rest: &[Id]) -> Result<Value, PickleError> {
        let storage = match &self.nodes[storage] {
            Node::Storage(storage) => storage,
            Node::OpaqueStorage => return Ok(Value::Opaque("tensor of a dtype that bbt does not load")),
            _ => return Err(self.damaged("a tensor has no storage")),
        };
        let (offset, shape, strides) = (self.size(offset)?, self.sizes(shape)?, self.sizes(strides)?);
        // Its elements stand for their negatives or conjugates.
        if let Some(&metadata) = rest.get(2)
            && !matches!(&self.nodes[metadata], Node::Plain(Value::None))
            && !matches!(&self.nodes[metadata], Node::Dict(items) if items.is_empty())
        {
            return Ok(Value::Opaque("tensor with a negative or conjugate bit"));
        }
        if let Some(tensor) = TensorData::view(storage.clone(), offset, shape.clone(), strides.clone()) {
            let requires_grad =
                rest.first().is_some_and(|&id| matches!(self.nodes[id], Node::Plain(Value::Bool(true))));
            return Ok(Value::Tensor(TensorData { requires_grad, ..tensor }));
        }
        match TensorData::is_expanded(storage, offset, &shape, &strides) {
            true => Ok(Value::Opaque("expanded tensor")),
            false => Err(self.damaged("a tensor reaches beyond its storage")),
        }
    }

    fn build(&mut self, target: Id, state: Id) -> Result<(), PickleError> {
        if let Node::Plain(Value::Opaque(_)) = self.nodes[target] {
            return Ok(());
        }
        if !matches!(self.nodes[state], Node::Dict(_)) {
            return Err(self.damaged("attributes are no dict"));
        }
        match &mut self.nodes[target] {
            Node::OrderedDict { attributes: attributes @ None, .. } => *attributes = Some(state),
            Node::OrderedDict { .. } => return Err(self.damaged("attributes are set twice")),
            _ => return Err(self.damaged("attributes are set on what has none")),
        }
        Ok(())
    }

    /// What is left of `budget` after a copy of `bytes`: what is long may be used again and again.
    fn rest_of(&self, budget: usize, bytes: usize) -> Result<usize, PickleError> {
        budget.checked_sub(bytes / 16).ok_or_else(|| self.damaged("it unfolds to too much"))
    }

    /// The finished value of a node. `budget` is how many more values there may be.
    fn value(&self, id: Id, depth: usize, budget: &mut usize) -> Result<Value, PickleError> {
        if depth > MAX_DEPTH || *budget == 0 {
            return Err(self.damaged("it is nested too deep, or unfolds to too much"));
        }
        *budget -= 1;
        let mut all =
            |ids: &[Id]| ids.iter().map(|&id| self.value(id, depth + 1, budget)).collect::<Result<Vec<_>, _>>();
        Ok(match &self.nodes[id] {
            Node::Plain(value) => {
                let bytes = match value {
                    Value::Str(text) => text.len(),
                    Value::Bytes(bytes) => bytes.len(),
                    Value::Tensor(tensor) => size_of_val(&tensor.shape[..]) + size_of_val(&tensor.strides[..]),
                    _ => 0,
                };
                *budget = self.rest_of(*budget, bytes)?;
                value.clone()
            }
            Node::List(elements) => Value::List(all(elements)?),
            Node::Tuple(elements) => Value::Tuple(all(elements)?),
            Node::Dict(items) => Value::Dict(self.entries(items, depth, budget)?),
            Node::OrderedDict { items, attributes } => Value::OrderedDict {
                items: self.entries(items, depth, budget)?,
                attributes: self
                    .entries(self.attributes(*attributes), depth, budget)?
                    .into_iter()
                    .map(|(name, value)| match name {
                        Value::Str(name) => Ok((name, value)),
                        _ => Err(self.damaged("an attribute's name is no string")),
                    })
                    .collect::<Result<_, _>>()?,
            },
            Node::Global(_) => Value::Opaque("class"),
            Node::Storage(_) | Node::OpaqueStorage => Value::Opaque("storage"),
        })
    }

    fn attributes(&self, id: Option<Id>) -> &[(Id, Id)] {
        match id.map(|id| &self.nodes[id]) {
            Some(Node::Dict(attributes)) => attributes,
            _ => &[],
        }
    }

    fn entries(
        &self,
        items: &[(Id, Id)],
        depth: usize,
        budget: &mut usize,
    ) -> Result<Vec<(Value, Value)>, PickleError> {
        let entry =
            |&(key, value): &(Id, Id)| Ok((self.value(key, depth + 1, budget)?, self.value(value, depth + 1, budget)?));
        items.iter().map(entry).collect()
    }
}

/// Storage classes of dtypes that bbt has no use for.
const OPAQUE_STORAGES: [&str; 7] = [
    "ComplexDoubleStorage",
    "ComplexFloatStorage",
    "QInt32Storage",
    "QInt8Storage",
    "QUInt2x4Storage",
    "QUInt4x2Storage",
    "QUInt8Storage",
];

/// Before 0.4 each dtype had a class of tensors.
const TENSOR_CLASSES: [&str; 10] =
    ["BFloat16", "Bool", "Byte", "Char", "Double", "Float", "Half", "Int", "Long", "Short"];

/// torch.dtype and torch.qscheme.
#[rustfmt::skip]
const DTYPES: [&str; 51] = [
    "float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool", "complex32",
    "complex64", "complex128", "uint16", "uint32", "uint64", "float4_e2m1fn_x2", "float8_e4m3fn", "float8_e4m3fnuz",
    "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu", "qint8", "quint8", "qint32", "quint4x2", "quint2x4", "bits8",
    "bits16", "bits1x8", "bits2x4", "bits4x2", "int1", "int2", "int3", "int4", "int5", "int6", "int7", "uint1", "uint2",
    "uint3", "uint4", "uint5", "uint6", "uint7", "per_tensor_affine", "per_tensor_symmetric", "per_channel_affine",
    "per_channel_symmetric", "per_channel_affine_float_qparams",
];

/// The allow-list.
fn global(module: &str, name: &str) -> Result<Node, PickleError> {
    let refused = || PickleError::Global(format!("{module}.{name}"));
    Ok(Node::Global(match (module, name) {
        ("collections", "OrderedDict") => Global::OrderedDict,
        ("torch._utils", "_rebuild_tensor" | "_rebuild_tensor_v2") => Global::RebuildTensor,
        ("torch._utils", "_rebuild_parameter" | "_rebuild_parameter_with_state") => Global::RebuildParameter,
        ("torch._tensor", "_rebuild_from_type_v2") => Global::FromType,
        ("torch", "Tensor") => Global::TensorClass,
        ("torch._utils", "_rebuild_tensor_v3") => Global::Opaque("tensor of a dtype that bbt does not load"),
        ("torch._utils", "_rebuild_sparse_tensor") => Global::Opaque("sparse tensor"),
        ("torch._utils", "_rebuild_qtensor") => Global::Opaque("quantized tensor"),
        ("torch._utils", "_rebuild_nested_tensor") => Global::Opaque("nested tensor"),
        ("torch._utils", "_rebuild_meta_tensor_no_storage") => Global::Opaque("meta tensor"),
        ("torch._utils", "_rebuild_wrapper_subclass") => Global::Opaque("tensor of another class"),
        ("torch._utils", "_rebuild_device_tensor_from_cpu_tensor" | "_rebuild_device_tensor_from_numpy") => {
            Global::Opaque("tensor of another device")
        }
        ("torch.nn.parameter", "Parameter") => Global::Opaque("parameter"),
        ("torch.serialization", "_get_layout") => Global::Opaque("torch.layout"),
        ("collections", "Counter") => Global::Opaque("Counter"),
        // Protocol 2 calls the module by its name in Python 2.
        ("builtins" | "__builtin__", "set") => Global::Opaque("set"),
        ("builtins" | "__builtin__", "bytearray") => Global::Opaque("bytearray"),
        ("builtins" | "__builtin__", "complex") => Global::Opaque("complex"),
        ("torch", "Size") => Global::Size,
        ("torch", "device") => Global::Device,
        // Protocol 2 has no opcode for bytes: they are a string and its encoding.
        ("_codecs", "encode") => Global::Encode,
        ("torch.storage", "UntypedStorage" | "TypedStorage") => Global::OpaqueStorage,
        ("torch" | "torch.cuda", class) if class.ends_with("Storage") => {
            match Dtype::ALL.into_iter().find(|dtype| dtype.storage_class() == class) {
                Some(dtype) => Global::Storage(dtype),
                None if OPAQUE_STORAGES.contains(&class) => Global::OpaqueStorage,
                None => return Err(refused()),
            }
        }
        ("torch" | "torch.cuda" | "torch.sparse" | "torch.cuda.sparse", class)
            if class.strip_suffix("Tensor").is_some_and(|kind| TENSOR_CLASSES.contains(&kind)) =>
        {
            Global::Opaque("tensor of an old class")
        }
        // A dtype is a value like any other, and stands as its name.
        ("torch", name) if DTYPES.contains(&name) => return Ok(Node::Plain(Value::Str(format!("torch.{name}")))),
        _ => return Err(refused()),
    }))
}

/// Pickles `value`, protocol 2. Returns the storages of its tensors in the order of their keys "0", "1", …
///
/// # Errors
/// A value nested too deep to be read back; a string or bytes of 4 GiB.
pub fn write(value: &Value) -> Result<(Vec<u8>, Vec<Arc<Storage>>), PickleError> {
    let mut writer = Writer { out: vec![0x80, 2], storages: vec![], keys: HashMap::new() };
    writer.value(value, 0)?;
    writer.out.push(b'.');
    Ok((writer.out, writer.storages))
}

struct Writer {
    out: Vec<u8>,
    storages: Vec<Arc<Storage>>,
    /// The key of each storage, by its address.
    keys: HashMap<*const Storage, usize>,
}

impl Writer {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), PickleError> {
        if depth > MAX_DEPTH {
            return Err(self.refused("the value is nested too deep"));
        }
        match value {
            Value::None => self.out.push(b'N'),
            Value::Bool(true) => self.out.push(0x88),
            Value::Bool(false) => self.out.push(0x89),
            Value::Int(n) => self.int(*n),
            Value::Float(x) => {
                self.out.push(b'G');
                self.out.extend(x.to_be_bytes());
            }
            Value::Str(text) => self.text(text)?,
            // As Python does where protocol 2 has no opcode; `torch.load` takes no other form.
            Value::Bytes(bytes) => {
                self.out.extend(b"c_codecs\nencode\n(");
                self.text(&bytes.iter().map(|&byte| char::from(byte)).collect::<String>())?;
                self.text("latin1")?;
                self.out.extend(b"tR");
            }
            Value::List(elements) => {
                self.out.extend(b"](");
                elements.iter().try_for_each(|element| self.value(element, depth + 1))?;
                self.out.push(b'e');
            }
            Value::Tuple(elements) => {
                self.out.push(b'(');
                elements.iter().try_for_each(|element| self.value(element, depth + 1))?;
                self.out.push(b't');
            }
            Value::Dict(items) => {
                self.out.push(b'}');
                self.items(items, depth)?;
            }
            Value::OrderedDict { items, attributes } => {
                self.out.extend(b"ccollections\nOrderedDict\n)R");
                self.items(items, depth)?;
                if !attributes.is_empty() {
                    self.out.extend(b"}(");
                    for (name, value) in attributes {
                        self.text(name)?;
                        self.value(value, depth + 1)?;
                    }
                    self.out.extend(b"ub");
                }
            }
            Value::Tensor(tensor) => self.tensor(tensor)?,
            Value::Opaque(name) => return Err(self.refused(&format!("bbt cannot write a value of type {name}"))),
        }
        Ok(())
    }

    fn items(&mut self, items: &[(Value, Value)], depth: usize) -> Result<(), PickleError> {
        self.out.push(b'(');
        for (key, value) in items {
            self.value(key, depth + 1)?;
            self.value(value, depth + 1)?;
        }
        self.out.push(b'u');
        Ok(())
    }

    fn int(&mut self, n: i64) {
        if let Ok(n) = u8::try_from(n) {
            self.out.extend([b'K', n]);
        } else if let Ok(n) = u16::try_from(n) {
            self.out.push(b'M');
            self.out.extend(n.to_le_bytes());
        } else if let Ok(n) = i32::try_from(n) {
            self.out.push(b'J');
            self.out.extend(n.to_le_bytes());
        } else {
            self.out.extend([0x8a, 8]);
            self.out.extend(n.to_le_bytes());
        }
    }

    fn text(&mut self, text: &str) -> Result<(), PickleError> {
        let length = u32::try_from(text.len());
        let length = length.map_err(|_| self.refused("a string has 4 GiB or more"))?;
        self.out.push(b'X');
        self.out.extend(length.to_le_bytes());
        self.out.extend(text.as_bytes());
        Ok(())
    }

    fn refused(&self, message: &str) -> PickleError {
        PickleError::Damaged { at: self.out.len(), message: message.into() }
    }

    /// `torch._utils._rebuild_tensor_v2(storage, offset, size, stride, requires_grad, OrderedDict())`
    fn tensor(&mut self, tensor: &TensorData) -> Result<(), PickleError> {
        let new = self.storages.len();
        let key = *self.keys.entry(Arc::as_ptr(&tensor.storage)).or_insert(new);
        if key == new {
            self.storages.push(tensor.storage.clone());
        }
        self.out.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        self.text("storage")?;
        self.out.extend(format!("ctorch\n{}\n", tensor.dtype().storage_class()).as_bytes());
        self.text(&key.to_string())?;
        self.text("cpu")?;
        self.int(tensor.storage.len() as i64);
        self.out.extend(b"tQ");
        self.int(tensor.offset as i64);
        for sizes in [&tensor.shape, &tensor.strides] {
            self.out.push(b'(');
            sizes.iter().for_each(|&n| self.int(n as i64));
            self.out.push(b't');
        }
        self.out.push(if tensor.requires_grad { 0x88 } else { 0x89 });
        self.out.extend(b"ccollections\nOrderedDict\n)RtR");
        Ok(())
    }
}

//! Checkpoint files: both ways between bbt and Python torch, and what becomes of damaged ones.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use bbt::checkpoint::{Dtype, Storage, TensorData, TrainingCheckpoint, Value, pickle, safetensors_file, torch_file};
use proptest::prelude::*;

use crate::allocations;

/// No reader of the files here has reason to ask for more at once.
pub(crate) const MOST: usize = 16 << 20;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn temporary() -> tempfile::TempDir {
    tempfile::tempdir().expect("a temporary directory")
}

fn str(text: &str) -> Value {
    Value::Str(text.into())
}

#[test]
fn the_originals_checkpoints_read_as_they_are() {
    let value = torch_file::read(&fixture("bitbyte_tiny/final_identity.pt")).expect("reads");
    let keys: Vec<_> = value.entries().iter().map(|(key, _)| key.as_str().expect("a string")).collect();
    assert_eq!(keys, ["step", "variant", "model_family", "model", "opt", "scaler", "args"]);
    assert_eq!(value.get("step").and_then(Value::as_i64), Some(19));
    assert_eq!(value.get("scaler").and_then(|s| s.get("scale")).and_then(Value::as_f64), Some(32768.0));
    let Some(Value::OrderedDict { items, attributes }) = value.get("model") else { panic!("no OrderedDict") };
    assert_eq!(items.len(), 19);
    assert_eq!(attributes[0].0, "_metadata");
    let tensor = |key: &str| match value.get("model").and_then(|m| m.get(key)) {
        Some(Value::Tensor(tensor)) => tensor.clone(),
        other => panic!("{key}: {other:?}"),
    };
    let (embedding, head) = (tensor("tok_emb.weight"), tensor("lm_head.weight"));
    assert!(std::sync::Arc::ptr_eq(&embedding.storage, &head.storage), "tied weights share their storage");
    assert_eq!((embedding.dtype(), &embedding.shape[..]), (Dtype::F32, &[256, 64][..]));
}

#[test]
fn writing_what_was_read_gives_the_same_and_twice_the_same_bytes() {
    for name in ["bitbyte_tiny/init.pt", "bitbyte_tiny/final_clipped.pt", "adamw8bit/ckpt.pt", "adamw8bit/opt_state.pt"]
    {
        let dir = temporary();
        let value = torch_file::read(&fixture(name)).expect(name);
        let (a, b) = (dir.path().join("a.pt"), dir.path().join("b.pt"));
        torch_file::write(&a, &value).expect("writes");
        torch_file::write(&b, &value).expect("writes");
        assert!(std::fs::read(&a).expect("a") == std::fs::read(&b).expect("b"), "{name} differs");
        assert!(torch_file::read(&a).expect("reads") == value, "{name} is not the same");
    }
}

/// What Python says of a value: the same for both sides.
const DESCRIBE: &str = include_str!("../python/describe.py");

fn describe(value: &Value) -> serde_json::Value {
    use serde_json::json;
    let items =
        |items: &[(Value, Value)]| items.iter().map(|(k, v)| json!([describe(k), describe(v)])).collect::<Vec<_>>();
    let all = |elements: &[Value]| elements.iter().map(describe).collect::<Vec<_>>();
    match value {
        Value::None => json!(["NoneType", null]),
        Value::Bool(x) => json!(["bool", x]),
        Value::Int(x) => json!(["int", x]),
        Value::Float(x) => {
            // As Python's repr: both print the shortest digits that read back.
            let text = match format!("{x:?}") {
                t if t == "NaN" => "nan".into(),
                t if t.contains('e') => {
                    let (mantissa, exponent) = t.split_once('e').expect("an exponent");
                    let (sign, digits) = exponent.strip_prefix('-').map_or(("+", exponent), |d| ("-", d));
                    format!("{}e{sign}{digits:0>2}", mantissa.strip_suffix(".0").unwrap_or(mantissa))
                }
                t => t,
            };
            json!(["float", text])
        }
        Value::Str(x) => json!(["str", x]),
        Value::Bytes(x) => json!(["bytes", x]),
        Value::List(x) => json!(["list", all(x)]),
        Value::Tuple(x) => json!(["tuple", all(x)]),
        Value::Dict(x) => json!(["dict", items(x)]),
        Value::OrderedDict { items: x, attributes } => {
            let mut attributes: Vec<_> = attributes.iter().map(|(k, v)| json!([k, describe(v)])).collect();
            attributes.sort_by_key(ToString::to_string);
            json!(["odict", items(x), attributes])
        }
        Value::Tensor(t) => {
            let kind = match t.dtype() {
                Dtype::F32 => "float32",
                Dtype::F64 => "float64",
                Dtype::F16 => "float16",
                Dtype::BF16 => "bfloat16",
                Dtype::I64 => "int64",
                Dtype::I32 => "int32",
                Dtype::I16 => "int16",
                Dtype::I8 => "int8",
                Dtype::U8 => "uint8",
                Dtype::Bool => "bool",
            };
            json!(["tensor", kind, t.shape, t.contiguous_bytes()])
        }
        Value::Opaque(kind) => json!(["opaque", kind]),
    }
}

fn python(code: &str, path: &Path) -> String {
    crate::common::python(&["-c".as_ref(), format!("{DESCRIBE}\n{code}").as_ref(), path.as_os_str()])
}

#[test]
fn what_pytorch_saves_bbt_reads() {
    let dir = temporary();
    let path = dir.path().join("theirs.pt");
    let printed = python(
        r#"
torch.manual_seed(0)
base = torch.randn(6, 4)
value = collections.OrderedDict(a=base, b=base[1:3], t=base.t(), odd=base[::2, 1], scalar=base[0, 0])
value.note = {"x": 1}
value = {
    "model": value,
    "all": [torch.arange(5).to(d) for d in (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32,
                                            torch.int16, torch.int8, torch.uint8, torch.bool)],
    "empty": torch.empty(0, 3), "zero": torch.tensor(7.5), "parameter": torch.nn.Parameter(torch.ones(2)),
    "plain": [None, True, False, 0, 255, 256, -1, 2**31, -2**40, 2**62, 1.5, -0.1, 1e300, "text äöü", (), (1,), (1, 2, 3), (1, 2, 3, 4)],
    "size": base.shape, "dtype": torch.bfloat16, "devices": [torch.device("cpu"), torch.device("cuda:1")],
    "bytes": bytes(range(256)), "nested": {1: {2: [{}]}}, -5: "negative key",
}
torch.save(value, sys.argv[1])
print(json.dumps(describe(value)))
"#,
        &path,
    );
    let theirs: serde_json::Value = serde_json::from_str(&printed).expect("JSON");
    let ours = torch_file::read(&path).expect("reads");
    assert!(describe(&ours) == theirs, "{}\n{theirs}", describe(&ours));
    let tensor = |key| match ours.get("model").and_then(|m| m.get(key)) {
        Some(Value::Tensor(tensor)) => tensor.clone(),
        other => panic!("{other:?}"),
    };
    assert!(std::sync::Arc::ptr_eq(&tensor("a").storage, &tensor("t").storage), "views share their storage");
}

#[test]
fn what_bbt_writes_plain_torch_load_reads() {
    let dir = temporary();
    let path = dir.path().join("ours.pt");
    let floats: Vec<u8> = (0..24u32).flat_map(|i| (i as f32 * 0.1).to_le_bytes()).collect();
    let storage = Storage::new(Dtype::F32, floats);
    let whole = TensorData::contiguous(storage.clone(), vec![6, 4]);
    let transposed = TensorData::view(storage.clone(), 0, vec![4, 6], vec![1, 4]).expect("a view");
    let all = Dtype::ALL.map(|dtype| {
        let bytes: Vec<u8> = (0..5 * dtype.size()).map(|i| (i % 2) as u8).collect();
        Value::Tensor(TensorData::contiguous(Storage::new(dtype, bytes), vec![5]))
    });
    let value = Value::Dict(vec![
        (
            str("model"),
            Value::OrderedDict {
                items: vec![(str("w"), Value::Tensor(whole)), (str("tied"), Value::Tensor(transposed))],
                attributes: vec![("_metadata".into(), Value::Dict(vec![(str(""), Value::Int(1))]))],
            },
        ),
        (str("all"), Value::List(all.into())),
        (Value::Int(-3), Value::Tuple(vec![Value::None, Value::Bool(true), Value::Float(f64::NAN)])),
        (str("ints"), Value::List([0, 255, 256, 65535, 65536, -1, i64::MIN, i64::MAX].map(Value::Int).into())),
        (str("text"), str("zwei Zeilen\nund ein ✓")),
        (str("bytes"), Value::List(vec![Value::Bytes((0..=255).collect()), Value::Bytes(vec![])])),
        (str("nothing"), Value::List(vec![Value::List(vec![]), Value::Tuple(vec![]), Value::Dict(vec![])])),
        (str("floats"), Value::List([0.0, 1.5, 1e-8, -2.5e300].map(Value::Float).into())),
        (str("empty"), Value::Tensor(TensorData::contiguous(Storage::new(Dtype::F32, vec![]), vec![0, 3]))),
    ]);
    torch_file::write(&path, &value).expect("writes");
    let printed = python(
        r#"
value = torch.load(sys.argv[1])  # weights_only=True is the default
assert value["model"]["w"].untyped_storage().data_ptr() == value["model"]["tied"].untyped_storage().data_ptr()
torch.load(sys.argv[1], mmap=True)
print(json.dumps(describe(value)))
"#,
        &path,
    );
    let theirs: serde_json::Value = serde_json::from_str(&printed).expect("JSON");
    assert!(describe(&value) == theirs, "{}\n{theirs}", describe(&value));
}

#[test]
fn safetensors_go_both_ways() {
    let dir = temporary();
    let (ours, theirs) = (dir.path().join("ours.safetensors"), dir.path().join("theirs.safetensors"));
    let checkpoint = TrainingCheckpoint::open(&fixture("bitbyte_tiny/final_identity.pt")).expect("opens");
    let mut weights = checkpoint.weights().clone();
    weights.remove("lm_head.weight");
    safetensors_file::write(&ours, &weights, HashMap::from([("note".into(), "x".into())])).expect("writes");
    python(
        &format!(
            "from safetensors.torch import load_file, save_file\n\
             a, b = load_file(sys.argv[1]), torch.load({:?})['model']\n\
             assert len(a) == 18 and all(torch.equal(a[k], b[k]) for k in a)\n\
             save_file({{k: v.to(torch.bfloat16) for k, v in a.items()}} | {{'n': torch.arange(3)}}, {:?}, metadata={{'m': 'n'}})",
            fixture("bitbyte_tiny/final_identity.pt"),
            theirs
        ),
        &ours,
    );
    let (read, metadata) = safetensors_file::read(&ours).expect("reads");
    assert!(read == weights && metadata["note"] == "x");
    let (read, metadata) = safetensors_file::read(&theirs).expect("reads");
    assert_eq!((read.len(), &metadata["m"][..], read["n"].dtype()), (19, "n", Dtype::I64));
    assert_eq!(read["tok_emb.weight"].dtype(), Dtype::BF16);
}

#[test]
fn a_global_that_is_not_allowed_is_refused_by_name() {
    let dir = temporary();
    let path = dir.path().join("evil.pt");
    let ran = dir.path().join("ran");
    python(
        &format!(
            "import os\nclass Evil:\n    def __reduce__(self): return os.system, ('touch {}',)\n\
             torch.save({{'model': Evil()}}, sys.argv[1])",
            ran.display()
        ),
        &path,
    );
    let error = torch_file::read(&path).expect_err("refuses").to_string();
    assert!(error.contains("posix.system") && error.contains("evil.pt"), "{error}");
    assert!(!ran.exists(), "it was executed");
}

/// A generator of bytes and numbers that is the same everywhere.
pub(crate) struct Random(pub u64);

impl Random {
    pub(crate) fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((self.0 >> 33) as usize) % n.max(1)
    }
}

/// One to three random changes: bits flipped, bytes set, inserted, removed, blocks copied, the end cut off.
pub(crate) fn mutate(bytes: &[u8], random: &mut Random) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for _ in 0..=random.below(3) {
        if bytes.is_empty() {
            break;
        }
        let at = random.below(bytes.len());
        match random.below(7) {
            0 => bytes[at] ^= 1 << random.below(8),
            1 => bytes[at] = [0, 0xff, 0x7f, 0x80, b'.', b'('][random.below(6)],
            2 => bytes[at] = random.below(256) as u8,
            3 => bytes.insert(at, random.below(256) as u8),
            4 => drop(bytes.remove(at)),
            5 => {
                let length = random.below(64.min(bytes.len() - at));
                let from = random.below(bytes.len() - length);
                let block = bytes[from..from + length].to_vec();
                bytes[at..at + length].copy_from_slice(&block);
            }
            _ => bytes.truncate(at),
        }
    }
    bytes
}

#[test]
fn a_damaged_file_is_an_error_or_the_right_tensors() {
    let dir = temporary();
    let path = dir.path().join("damaged.pt");
    let right = torch_file::read(&fixture("bitbyte_tiny/init.pt")).expect("reads");
    let whole = std::fs::read(fixture("bitbyte_tiny/init.pt")).expect("init.pt");
    let mut random = Random(1);
    let mut refused = 0;
    allocations::reset();
    for case in 0..4000 {
        let mut damaged = mutate(&whole, &mut random);
        if case % 2 == 0 {
            // Tensors are most of the file: half of the cases change its structure.
            damaged = whole.clone();
            let structure: Vec<usize> = (0..4200).chain(whole.len() - 2600..whole.len()).collect();
            for _ in 0..=random.below(3) {
                damaged[structure[random.below(structure.len())]] = random.below(256) as u8;
            }
        }
        std::fs::write(&path, &damaged).expect("writes");
        match torch_file::read(&path) {
            Ok(value) => assert!(value == right, "case {case} read something else"),
            Err(error) => {
                refused += 1;
                assert!(error.to_string().contains("damaged.pt"), "case {case}: {error}");
            }
        }
    }
    assert!(refused > 2000, "only {refused} were refused");
    assert!(allocations::largest() < MOST, "a damaged file asked for {} bytes", allocations::largest());
}

/// The file with another pickle, checksums and all right.
fn with_pickle(original: &Path, pickled: &[u8], to: &Path) {
    let file = std::fs::File::open(original).expect("opens");
    let mut archive = zip::ZipArchive::new(file).expect("a zip archive");
    let mut out = zip::ZipWriter::new(std::fs::File::create(to).expect("creates"));
    let options = zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    for index in 0..archive.len() {
        let mut entry = archive.by_index(index).expect("an entry");
        let name = entry.name().expect("a name").into_owned();
        let mut bytes = vec![];
        entry.read_to_end(&mut bytes).expect("reads");
        out.start_file(&name, options).expect("starts");
        out.write_all(if name.ends_with("data.pkl") { pickled } else { &bytes }).expect("writes");
    }
    out.finish().expect("finishes");
}

#[test]
fn a_damaged_pickle_never_crashes_hangs_or_takes_much_memory() {
    let dir = temporary();
    let path = dir.path().join("damaged.pt");
    let original = fixture("bitbyte_tiny/init.pt");
    let pickled = {
        let mut archive = zip::ZipArchive::new(std::fs::File::open(&original).expect("opens")).expect("a zip archive");
        let mut bytes = vec![];
        archive.by_name("init/data.pkl").expect("data.pkl").read_to_end(&mut bytes).expect("reads");
        bytes
    };
    let mut random = Random(2);
    allocations::reset();
    for _ in 0..500 {
        with_pickle(&original, &mutate(&pickled, &mut random), &path);
        // Whatever it is, opening it as a checkpoint gives a checkpoint or an error that names it.
        if let Err(error) = TrainingCheckpoint::open(&path) {
            assert!(error.to_string().contains("damaged.pt"), "{error}");
        }
    }
    let mut load = |_: &str, dtype: Dtype, numel: usize| match numel {
        0..=65536 => Ok(Storage::new(dtype, vec![0u8; numel * dtype.size()])),
        _ => Err("too large".to_string()),
    };
    for _ in 0..20_000 {
        let _ = pickle::parse(&mutate(&pickled, &mut random), &mut load);
    }
    for length in 0..20_000 {
        let bytes: Vec<u8> = (0..length % 200).map(|_| random.below(256) as u8).collect();
        let _ = pickle::parse(&bytes, &mut load);
    }
    assert!(allocations::largest() < MOST, "a damaged pickle asked for {} bytes", allocations::largest());
}

#[test]
fn a_pickle_that_unfolds_without_end_is_refused() {
    let mut load = |_: &str, _: Dtype, _: usize| Err("no storage".to_string());
    // A list of two references to a list of two references to …: "billion laughs".
    let mut laughs = b"\x80\x02]q\x00".to_vec();
    for level in 0..60u8 {
        laughs.extend([b']', b'q', level + 1, b'(', b'h', level, b'h', level, b'e']);
    }
    laughs.push(b'.');
    assert!(pickle::parse(&laughs, &mut load).is_err());
    // A list that holds itself, and one that is very deep.
    assert!(pickle::parse(b"\x80\x02]q\x00h\x00a.", &mut load).is_err());
    let deep = [vec![b']'; 100_000], vec![b'a'; 99_999], vec![b'.']].concat();
    assert!(pickle::parse(&deep, &mut load).is_err());
    // A tensor that is larger than its storage, and one that has each of its elements many times.
    let huge = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQK\x00(J\xff\xff\xff\x7fJ\xff\xff\xff\x7ft(K\x01K\x01t\x89)tR.";
    let mut load = |_: &str, dtype: Dtype, n: usize| Ok(Storage::new(dtype, vec![0u8; n * dtype.size()]));
    let error = pickle::parse(huge, &mut load).expect_err("refuses").to_string();
    assert!(error.contains("beyond its storage"), "{error}");
    let mut expanded = huge.to_vec();
    let strides = expanded.windows(4).rposition(|bytes| bytes == b"K\x01K\x01").expect("strides");
    (expanded[strides + 1], expanded[strides + 3]) = (0, 0);
    assert_eq!(pickle::parse(&expanded, &mut load).expect("reads"), Value::Opaque("expanded tensor"));
}

#[test]
fn a_value_used_again_and_again_is_not_copied_each_time() {
    let long = "a".repeat(30_000);
    let text = |text: &str| [b"X", &(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat();
    // Each puts a global or an OrderedDict into the memo as 0, a large argument as 1, and nothing on the stack.
    let setups = [
        (
            "attributes",
            [&b"ccollections\nOrderedDict\n)Rq\x000}("[..], &b"NN".repeat(15_000), b"uq\x010"].concat(),
            "h0h1b0",
        ),
        ("Size", [&b"ctorch\nSize\nq\x000("[..], &b")".repeat(30_000), b"t\x85q\x010"].concat(), "h0h1R0"),
        ("device", [&b"ctorch\ndevice\nq\x000"[..], &text(&long), b"\x85q\x010"].concat(), "h0h1R0"),
        ("bytes", [&b"c_codecs\nencode\nq\x000"[..], &text(&long), &text("latin1"), b"\x86q\x010"].concat(), "h0h1R0"),
    ];
    let mut load = |_: &str, _: Dtype, _: usize| Err("no storage".to_string());
    for (what, setup, again) in setups {
        let again = again.replace("h0", "h\0").replace("h1", "h\x01").repeat(5000);
        let pickled = [&b"\x80\x02"[..], &setup, again.as_bytes(), b"N."].concat();
        allocations::reset();
        let _ = pickle::parse(&pickled, &mut load);
        let times = allocations::total() / pickled.len();
        assert!(times < 1000, "{what}: {} bytes of pickle asked for {times} times as many", pickled.len());
    }
}

#[test]
fn what_is_no_checkpoint_is_called_what_it_is() {
    let dir = temporary();
    let path = dir.path().join("other.pt");
    let message = |path: &Path| torch_file::read(path).expect_err("refuses").to_string();
    let script = "module = torch.nn.Sequential(*[torch.nn.Linear(2, 2) for _ in range(4)])\n\
                  torch.jit.trace(module, torch.zeros(1, 2)).save(sys.argv[1])";
    let legacy = "torch.save({'a': torch.zeros(2)}, sys.argv[1], _use_new_zipfile_serialization=False)";
    for (code, expected) in [(script, "TorchScript"), (legacy, "old format")] {
        python(code, &path);
        assert!(message(&path).contains(expected), "{}", message(&path));
    }
    let whole = std::fs::read(fixture("bitbyte_tiny/init.pt")).expect("init.pt");
    for (bytes, expected) in [(&b""[..], "no checkpoint"), (b"text", "no checkpoint"), (&whole[..9999], "cut off")] {
        std::fs::write(&path, bytes).expect("writes");
        assert!(message(&path).contains(expected), "{}", message(&path));
    }
    // A pipe that nobody writes to must not be waited for.
    let pipe = dir.path().join("pipe");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().expect("mkfifo").success());
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || sender.send(torch_file::read(&pipe).map(drop).map_err(|e| e.to_string())));
    let read = receiver.recv_timeout(std::time::Duration::from_secs(120)).expect("it waits for the pipe");
    assert!(read.expect_err("refuses").contains("not a file"));
}

fn values() -> impl Strategy<Value = Value> {
    let tensor = (0..Dtype::ALL.len(), prop::collection::vec(0..4usize, 0..4)).prop_map(|(dtype, shape)| {
        let dtype = Dtype::ALL[dtype];
        let bytes = vec![1u8; shape.iter().product::<usize>() * dtype.size()];
        Value::Tensor(TensorData::contiguous(Storage::new(dtype, bytes), shape))
    });
    let leaf = prop_oneof![
        Just(Value::None),
        any::<bool>().prop_map(Value::Bool),
        any::<i64>().prop_map(Value::Int),
        prop::num::f64::NORMAL.prop_map(Value::Float),
        ".{0,20}".prop_map(Value::Str),
        prop::collection::vec(any::<u8>(), 0..20).prop_map(Value::Bytes),
        tensor,
    ];
    leaf.prop_recursive(4, 64, 6, |inner| {
        let items = || prop::collection::vec((".{0,6}".prop_map(Value::Str), inner.clone()), 0..6);
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(Value::List),
            prop::collection::vec(inner.clone(), 0..6).prop_map(Value::Tuple),
            items().prop_map(Value::Dict),
            (items(), inner.clone())
                .prop_map(|(items, x)| Value::OrderedDict { items, attributes: vec![("_metadata".into(), x)] }),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_value_is_read_back_as_written(value in values()) {
        let dir = temporary();
        let path = dir.path().join("value.pt");
        torch_file::write(&path, &value).expect("writes");
        prop_assert_eq!(torch_file::read(&path).expect("reads"), value);
    }
}

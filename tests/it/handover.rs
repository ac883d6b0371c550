//! Checkpoints as people have them: what other PyTorch programs save, in whatever form, is taken right or refused by
//! name. Each file here is written by PyTorch itself, and `torch.load` reads all of them.

use std::fs;

use bbt::checkpoint::{Dtype, Storage, TrainingCheckpoint, Value, pickle, torch_file};

use crate::allocations;
use crate::common::cli::{Done, Running, Workspace};
use crate::common::{Golden, assert_same_checkpoint, python};
use crate::interchange::{MOST, Random, mutate};

/// Status of what the command line says wrongly.
const USAGE: i32 = 2;
/// Status of everything else.
const FAILURE: i32 = 1;

/// What a Python script of these tests can use: `golden()` is the checkpoint `golden.pt`, of 20 steps; `save` writes a
/// changed one, and sees that plain `torch.load` reads it.
const PRELUDE: &str = include_str!("../python/handover.py");

/// Runs a Python script in the workspace, and returns what it prints.
fn torch(ws: &Workspace, script: &str) -> String {
    let script = format!("{PRELUDE}\n{script}");
    let dir = ws.path("");
    python(&["-c".as_ref(), script.as_ref(), dir.as_os_str(), env!("CARGO_MANIFEST_DIR").as_ref()])
}

const EVAL: &str = "--data text.bin --seq_len 64 --max_bytes 1000 --json";
/// One step past golden.pt, exact and quick.
const TRAIN: &str = "--data text.bin --seq_len 16 --batch_size 1 --device cpu --set train.precision=fp32 --steps 21";
/// The first step of a new run.
const ONE: &str = "--data text.bin --seq_len 16 --batch_size 1 --device cpu --set train.precision=fp32 --steps 1";

fn loss(ws: &Workspace, ckpt: &str, flags: &str) -> f64 {
    ws.ok(&format!("eval --ckpt {ckpt} {EVAL} {flags}")).json()["loss"].as_f64().expect("a loss")
}

/// Runs `line`, which must fail in one message with these words.
fn fails(ws: &Workspace, line: &str, status: i32, parts: &[&str]) {
    let done = ws.bbt(line);
    assert_clear(line, &done, status, parts);
}

fn assert_clear(line: &str, done: &Done, status: i32, parts: &[&str]) {
    assert_eq!((done.status, done.text().as_str()), (Some(status), ""), "bbt {line}: {}", done.stderr);
    let at = done.stderr.find("bbt: ").unwrap_or_else(|| panic!("bbt {line}: {}", done.stderr));
    for part in parts {
        assert!(done.stderr[at..].contains(part), "bbt {line}: {part:?} in {}", done.stderr);
    }
    for part in ["panicked", "internal failure", "frame #"] {
        assert!(!done.stderr.contains(part), "bbt {line}: {}", done.stderr);
    }
}

/// Everything of the two checkpoints but for who wrote the first: bbt's own record.
fn assert_resumed_alike(ws: &Workspace, a: &str, b: &str) {
    let read = |name: &str| torch_file::read(&ws.path(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
    assert_same_checkpoint(&read(a), &read(b), a);
}

// --- weights ----------------------------------------------------------------------------------------------

/// field.md, rows 4 and 5.
#[test]
fn weights_alone_are_taken_once_the_number_of_heads_is_given() {
    let ws = Workspace::new();
    torch(
        &ws,
        r#"
from safetensors.torch import save_file
weights = golden()["model"]
save("plain.pt", value=weights)
save("dict.pt", value=dict(weights))
save("wrapped.pt", value={"model": weights})
save("lightning.pt", value={"state_dict": weights, "epoch": 3})
save("compiled.pt", value={"_orig_mod." + name: tensor for name, tensor in weights.items()})
tensors = {name: tensor.clone() for name, tensor in weights.items() if name != "lm_head.weight"}
save_file(tensors, "plain.safetensors", metadata={"format": "pt"})
save_file(tensors, "bare.safetensors")
"#,
    );
    let expected = loss(&ws, "golden.pt", "");
    for file in
        ["plain.pt", "dict.pt", "wrapped.pt", "lightning.pt", "compiled.pt", "plain.safetensors", "bare.safetensors"]
    {
        let error = TrainingCheckpoint::open(&ws.path(file)).expect_err("no heads").to_string();
        assert!(error.contains(file) && error.contains("--n_head"), "{error}");
        let shown = ws.ok(&format!("inspect {file}")).text();
        assert!(shown.contains("2 layers × 64, keys 64 wide, d_ff 160") && shown.contains("--n-head"), "{shown}");

        assert_eq!(loss(&ws, file, "--n_head 4"), expected, "{file}");
    }
    for file in ["plain.pt", "wrapped.pt", "plain.safetensors"] {
        for output in ["out.pt", "out.safetensors"] {
            let done = ws.ok(&format!("convert {file} {output} --n_head 4 --allow_overwrite"));
            assert!(done.stderr.contains("4 heads") && done.stderr.contains("int8"), "{}", done.stderr);
            assert_eq!(loss(&ws, output, ""), expected, "{file} as {output}");
        }
        ws.ok(&format!("train --init {file} --n_head 4 {ONE} --out from-{file}/ckpt.pt"));
        let first = |log: &str| ws.losses(log)[&0];
        ws.ok(&format!("train --init golden.pt {ONE} --out from-golden/ckpt.pt --allow_overwrite"));
        assert_eq!(first(&format!("from-{file}/metrics.jsonl")), first("from-golden/metrics.jsonl"));
        for line in [
            format!("eval --ckpt {file} {EVAL}"),
            format!("generate --ckpt {file} --prompt a"),
            format!("convert {file} no.pt"),
            format!("train --init {file} {TRAIN} --out no"),
        ] {
            fails(&ws, &line, FAILURE, &[file, "--n_head"]);
        }
    }
    assert_eq!(
        ws.ok("generate --ckpt plain.pt --n_head 4 --prompt a --max_new_tokens 9 --temperature 0").stdout.len(),
        11
    );
    // There is no step to go on after.
    fails(
        &ws,
        &format!("train --resume plain.pt --n_head 4 {TRAIN} --out no"),
        FAILURE,
        &["optimizer state", "--init"],
    );
    let line = format!("train --resume plain.pt --no_opt_state --n_head 4 {TRAIN} --out no");
    fails(&ws, &line, FAILURE, &["`step`", "--init"]);
    // What contradicts the weights, or a checkpoint that says it itself.
    fails(&ws, &format!("eval --ckpt plain.pt {EVAL} --n_head 5"), FAILURE, &["plain.pt", "64", "--n_head"]);
    fails(&ws, &format!("eval --ckpt golden.pt {EVAL} --n_head 8"), USAGE, &["golden.pt", "--n-head 8", "4"]);
    fails(&ws, &format!("eval --ckpt golden.pt {EVAL} --no_act_quant"), USAGE, &["golden.pt", "--no-act-quant"]);
    let shape = format!("train --init plain.pt --n_head 4 --d_ff 96 {TRAIN} --out no");
    fails(&ws, &shape, USAGE, &["model.d_ff", "96", "160"]);
}

#[test]
fn weights_alone_tell_their_key_value_heads_and_activations_are_asked_for() {
    let ws = Workspace::new();
    torch(
        &ws,
        r#"
sys.path.insert(0, repository + "/tests/python")
import bitbytelm
torch.manual_seed(0)
torch.save(bitbytelm.BitByteLM(1, 32, 4, 48, n_kv_head=2).state_dict(), "grouped.pt")
c = golden()
c["args"]["no_act_quant"] = True
torch.save(c, "full.pt")
"#,
    );
    ws.ok("convert grouped.pt whole.pt --n_head 4");
    let shown = ws.ok("inspect whole.pt").text();
    assert!(shown.contains("1 layers × 32, 4 heads (2 key/value), d_ff 48"), "{shown}");
    // With 2 heads of 16 the keys are those of one head.
    ws.ok("convert grouped.pt whole.pt --n_head 2 --allow_overwrite");
    let shown = ws.ok("inspect whole.pt").text();
    assert!(shown.contains("2 heads (1 key/value)"), "{shown}");

    torch(&ws, r#"torch.save(golden()["model"], "plain.pt")"#);
    let full = loss(&ws, "full.pt", "");
    assert_eq!(loss(&ws, "plain.pt", "--n_head 4 --no_act_quant"), full);
    assert_ne!(loss(&ws, "plain.pt", "--n_head 4"), full);
}

/// field.md, row 6.
#[test]
fn the_prefixes_of_wrappers_are_taken_off() {
    let ws = Workspace::new();
    torch(
        &ws,
        r#"
for file, prefix in [("a.pt", "_orig_mod."), ("b.pt", "module."), ("c.pt", "module._orig_mod."), ("d.pt", "_orig_mod.module.")]:
    save(file, lambda c: c.update(model={prefix + name: tensor for name, tensor in c["model"].items()}))
def one(c):
    c["model"]["module.norm_f.weight"] = c["model"].pop("norm_f.weight")
save("one.pt", one)
"#,
    );
    ws.ok(&format!("train --resume golden.pt {TRAIN} --out golden"));
    for file in ["a.pt", "b.pt", "c.pt", "d.pt"] {
        ws.ok(&format!("train --resume {file} {TRAIN} --out {file}.run"));
        assert_resumed_alike(&ws, &format!("{file}.run/ckpt.pt"), "golden/ckpt.pt");
    }
    // A converted one has PyTorch's plain names, and its moments.
    ws.ok("convert c.pt plain.pt");
    ws.ok(&format!("train --resume plain.pt {TRAIN} --out plain"));
    assert_resumed_alike(&ws, "plain/ckpt.pt", "golden/ckpt.pt");
    fails(&ws, &format!("eval --ckpt one.pt {EVAL}"), FAILURE, &["one.pt", "missing norm_f.weight", "module.norm_f"]);
}

// --- values -----------------------------------------------------------------------------------------------

/// field.md, row 3.
#[test]
fn the_step_is_read_however_it_was_saved() {
    let ws = Workspace::new();
    torch(
        &ws,
        r#"
steps = [torch.tensor(19), torch.tensor([19]), torch.tensor(19.0), torch.tensor([19], dtype=torch.int32),
         torch.tensor(19, dtype=torch.bfloat16), 19.0]
for i, step in enumerate(steps):
    save(f"right{i}.pt", put("step", step))
for i, step in enumerate([torch.tensor([1, 2]), "19", {19}, 19.5, -2, [19], True, 2**70]):
    save(f"wrong{i}.pt", put("step", step))
save("none.pt", lambda c: c.pop("step"))
"#,
    );
    ws.ok(&format!("train --resume golden.pt {TRAIN} --out golden"));
    for index in 0..6 {
        let done = ws.ok(&format!("train --resume right{index}.pt {TRAIN} --out run{index}"));
        assert!(done.stderr.contains("at step 20 of 21"), "{}", done.stderr);
        assert_resumed_alike(&ws, &format!("run{index}/ckpt.pt"), "golden/ckpt.pt");
    }
    for index in 0..8 {
        let file = format!("wrong{index}.pt");
        fails(&ws, &format!("train --resume {file} {TRAIN} --out no"), FAILURE, &[&file, "`step`"]);
    }
    fails(&ws, &format!("train --resume none.pt {TRAIN} --out no"), FAILURE, &["none.pt", "`step`", "--init"]);
    ws.ok(&format!("eval --ckpt none.pt {EVAL}"));
}

/// The kind of row 3: what bbt uses and cannot read has a name, and no default.
#[test]
fn a_value_that_cannot_be_read_is_refused_by_its_key() {
    let ws = Workspace::new();
    let cases = [
        (r#"put("model_family", 1)"#, "`model_family`"),
        (r#"put("variant", ["ar"])"#, "`variant`"),
        (r#"put("format", 7)"#, "`format`"),
        (r#"put("format", "packed_v9")"#, "format packed_v9"),
        (r#"put("args", [1])"#, "`args`"),
        (r#"put("args", "n_layer", "2")"#, "`n_layer` of its `args`"),
        (r#"put("args", "n_kv_head", 2.5)"#, "`n_kv_head` of its `args`"),
        (r#"put("args", "no_act_quant", "no")"#, "`no_act_quant` of its `args`"),
        (r#"put("args", "use_sdpa", {1})"#, "`use_sdpa` of its `args`"),
        (r#"put("scaler", 65536.0)"#, "`scaler`"),
        (r#"put("scaler", "scale", "large")"#, "`scale` of its `scaler`"),
        (r#"put("scaler", "scale", float("nan"))"#, "`scale` of its `scaler`"),
        (r#"put("scaler", "_growth_tracker", 1.5)"#, "`_growth_tracker` of its `scaler`"),
        (r#"lambda c: c["scaler"].pop("growth_interval")"#, "`growth_interval`"),
        (r#"put("model", "norm_f.weight", {1})"#, "norm_f.weight is no tensor but of type set"),
        (
            r#"put("model", "norm_f.weight", torch.ones(64).to_sparse())"#,
            "norm_f.weight is no tensor but of type sparse",
        ),
        (r#"put("model", "norm_f.weight", torch.ones(1).expand(64))"#, "expanded tensor"),
        (r#"put("model", "norm_f.weight", torch._neg_view(torch.ones(64)))"#, "negative"),
        (r#"put("bbt", "x")"#, "`bbt`"),
        (r#"put("bbt", {"version": 2, "config": ""})"#, "later bbt"),
        (r#"put("bbt", {"version": 1})"#, "`config`"),
        (r#"put("bbt", {"version": 1, "config": 5})"#, "`config`"),
        (r#"put("bbt", {"version": 1, "config": "{}", "progress": 5})"#, "`progress`"),
        (
            r#"put("bbt", {"version": 1, "config": "model: {n_layer: 2, d_model: 64, n_head: 4, d_ff: 160}", "progress": "{}"})"#,
            "`bbt.progress`",
        ),
    ];
    let script: String = (0..).zip(&cases).map(|(i, (change, _))| format!("save('{i}.pt', {change})\n")).collect();
    torch(&ws, &script);
    for (index, (change, expected)) in (0..).zip(&cases) {
        let file = format!("{index}.pt");
        let error = TrainingCheckpoint::open(&ws.path(&file)).expect_err(change).to_string();
        assert!(error.contains(&file) && error.contains(expected), "{change}: {error}");
    }

    fails(&ws, &format!("eval --ckpt 5.pt {EVAL}"), FAILURE, &["5.pt", cases[5].1]);
    assert!(ws.ok("inspect 5.pt").text().contains(cases[5].1));

    // What only resuming reads.
    let cases = [
        (r#"put("opt", "state", [])"#, "`opt.state`"),
        (r#"put("opt", "param_groups", None)"#, "`opt.param_groups`"),
        (r#"put("opt", "param_groups", 0, "params", [str(i) for i in range(18)])"#, "`opt.param_groups[0].params`"),
        (r#"lambda c: c["opt"]["state"].update({"x": c["opt"]["state"].pop(17)})"#, "`opt.state`"),
        (r#"put("opt", "state", 3, "step", "19")"#, "step of blocks.0.attn.k_proj.weight"),
        (r#"put("opt", "state", 3, "step", torch.tensor(-1.0))"#, "step of blocks.0.attn.k_proj.weight"),
        (
            r#"put("opt", "state", 3, "exp_avg", torch.full((64, 64), float("nan")))"#,
            "exp_avg of blocks.0.attn.k_proj.weight is not finite",
        ),
        (r#"put("opt", "param_groups", 0, "amsgrad", "no")"#, "`amsgrad`"),
    ];
    let script: String = (0..).zip(&cases).map(|(i, (change, _))| format!("save('o{i}.pt', {change})\n")).collect();
    torch(&ws, &script);
    for (index, (_, expected)) in (0..).zip(&cases) {
        let line = format!("train --resume o{index}.pt {TRAIN} --out no");
        fails(&ws, &line, FAILURE, &[expected, "--no-opt-state"]);
    }
    ws.ok(&format!("eval --ckpt o0.pt {EVAL}"));
}

/// Everything that plain `torch.load` reads (PyTorch 2.11), by name. The second word says what bbt calls it.
const ODD: &str = r#"
p = torch.nn.Parameter(torch.ones(2)); p.note = 1
t = torch.ones(2); t.note = 1
odd = dict(
    set={1, 2}, counter=collections.Counter("abca"), bytearray=bytearray(b"xyz"), complex=1 + 2j, long=2**70,
    negative_long=-2**80, float8=torch.zeros(3).to(torch.float8_e4m3fn), uint16=torch.zeros(3, dtype=torch.uint16),
    uint64=torch.zeros(3, dtype=torch.uint64), complex64=torch.zeros(3, dtype=torch.complex64),
    sparse=torch.eye(3).to_sparse(), csr=torch.eye(3).to_sparse_csr(),
    quantized=torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8),
    per_channel=torch.quantize_per_channel(torch.ones(2, 3), torch.tensor([.1, .2]), torch.tensor([0, 0]), 0, torch.qint8),
    meta=torch.empty(3, device="meta"), expanded=torch.ones(1).expand(4), storage=torch.ones(3).untyped_storage(),
    layout=torch.sparse_coo, surrogate="a\udc80b", conjugate=torch.zeros(3, dtype=torch.complex64).conj(),
    negative=torch._neg_view(torch.ones(3)), dtype=torch.float8_e5m2, parameter=p, tensor=t,
    nested=torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), cls=collections.OrderedDict,
)
"#;

/// field.md, row 11.
#[test]
fn a_value_of_a_type_that_bbt_does_not_use_hides_nothing() {
    let ws = Workspace::new();
    let printed = torch(
        &ws,
        &format!(
            r#"{ODD}
for name, value in odd.items():
    save(f"{{name}}.pt", value={{"before": 1, "odd": value, "list": [value], "after": torch.arange(3)}})
    print(name)
save("all.pt", lambda c: (c.update(odd), c["args"].update(odd), c["opt"]["param_groups"][0].update(odd)))
"#
        ),
    );
    for name in printed.lines() {
        let value = torch_file::read(&ws.path(format!("{name}.pt"))).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!((value.get("before"), value.entries().len()), (Some(&Value::Int(1)), 4), "{name}");
        let Some(Value::Tensor(after)) = value.get("after") else { panic!("{name}: {value:?}") };
        assert_eq!(after.contiguous_bytes()[8], 1, "{name}: what comes behind it");
        // These have a meaning of their own.
        match (name, value.get("odd")) {
            ("dtype", Some(Value::Str(_))) | ("parameter" | "tensor", Some(Value::Tensor(_))) => {}
            (_, Some(Value::Opaque(_))) => {}
            (_, other) => panic!("{name}: {other:?}"),
        }
    }
    assert!(printed.lines().count() > 20);
    assert_eq!(loss(&ws, "all.pt", ""), loss(&ws, "golden.pt", ""));
    for file in ["all.pt", "golden.pt"] {
        ws.ok(&format!("train --resume {file} {TRAIN} --out {file}.run"));
    }
    assert_resumed_alike(&ws, "all.pt.run/ckpt.pt", "golden.pt.run/ckpt.pt");
    let shown = ws.ok("inspect all.pt").text();
    for kind in ["set", "Counter", "sparse tensor", "quantized tensor", "int of more than 64 bits"] {
        assert!(shown.contains(kind), "{kind} in {shown}");
    }
    // Another .pt keeps the rest, and says what it cannot.
    let done = ws.ok("convert all.pt rest.pt");
    for name in ["left out set (set)", "left out args.sparse (sparse tensor)", "left out quantized (quantized tensor)"]
    {
        assert!(done.stderr.contains(name), "{}", done.stderr);
    }
    torch(&ws, r#"assert torch.load("rest.pt")["dtype"] is not None and torch.load("rest.pt")["step"] == 19"#);
}

/// As for what bbt does use: no damage crashes the reader, or makes it ask for much memory.
#[test]
fn damage_among_values_that_bbt_does_not_use_is_harmless() {
    let ws = Workspace::new();
    torch(
        &ws,
        &format!(
            r#"{ODD}
import zipfile
torch.save(odd, "odd.pt")
open("odd.pkl", "wb").write(zipfile.ZipFile("odd.pt").read("odd/data.pkl"))
"#
        ),
    );
    let pickled = fs::read(ws.path("odd.pkl")).expect("reads");
    let mut load = |_: &str, dtype: Dtype, numel: usize| match numel {
        0..=65536 => Ok(Storage::new(dtype, vec![0u8; numel * dtype.size()])),
        _ => Err("too large".to_string()),
    };
    assert_eq!(pickle::parse(&pickled, &mut load).expect("parses").entries().len(), 26);
    let mut random = Random(3);
    allocations::reset();
    let mut read = 0;
    for _ in 0..5_000 {
        read += usize::from(pickle::parse(&mutate(&pickled, &mut random), &mut load).is_ok());
    }
    assert!((100..4900).contains(&read), "{read} of 5000 were read");
    assert!(allocations::largest() < MOST, "a damaged pickle asked for {} bytes", allocations::largest());
}

// --- optimizers -------------------------------------------------------------------------------------------

/// field.md, rows 1, 2 and 8.
#[test]
fn optimizer_states_of_other_times_and_groups_are_the_same_moments() {
    let ws = Workspace::new();
    torch(
        &ws,
        r#"
def each(change):
    def changed(c):
        for entry in c["opt"]["state"].values():
            entry["step"] = change(entry["step"])
    return changed
save("int.pt", each(int))
save("float64.pt", each(lambda step: step.double()))
save("lr.pt", lambda c: c["opt"]["param_groups"][0].update(lr=torch.tensor(1e-3), betas=(torch.tensor(0.9), 0.95)))
from torch.utils.serialization import config
config.save.compute_crc32 = False
save("nocrc.pt")
config.save.compute_crc32 = True

def in_groups(*groups):
    "PyTorch numbers parameters through the groups."
    def changed(c):
        state, group = c["opt"]["state"], c["opt"]["param_groups"][0]
        order = [i for members in groups for i in members]
        c["opt"]["state"] = {new: state[old] for new, old in enumerate(order)}
        at, c["opt"]["param_groups"] = 0, []
        for members in groups:
            decay = 0.1 if state[members[0]]["exp_avg"].dim() > 1 else 0.0
            c["opt"]["param_groups"].append({**group, "weight_decay": decay, "params": list(range(at, at + len(members)))})
            at += len(members)
    return changed
dims = [tensor["exp_avg"].dim() for tensor in golden()["opt"]["state"].values()]
matrices = [i for i, n in enumerate(dims) if n > 1]
vectors = [i for i, n in enumerate(dims) if n == 1]
save("decay_first.pt", in_groups(matrices, vectors))
save("decay_last.pt", in_groups(vectors, matrices))
save("embedding.pt", in_groups(matrices[:1], vectors, matrices[1:]))
save("alike.pt", in_groups(list(range(9)), list(range(9, 18))))
save("others.pt", in_groups(matrices[::-1], vectors))
"#,
    );
    ws.ok(&format!("train --resume golden.pt {TRAIN} --out golden"));
    for name in ["int", "float64", "lr", "nocrc", "decay_first", "decay_last", "embedding"] {
        let done = ws.ok(&format!("train --resume {name}.pt {TRAIN} --out {name}"));
        assert_resumed_alike(&ws, &format!("{name}/ckpt.pt"), "golden/ckpt.pt");
        // Groups that do not decay are a rule of their own.
        let grouped = ["decay_first", "decay_last", "embedding"].contains(&name);
        assert_eq!(done.stderr.contains("--set optim.decay=matrices"), grouped, "{}", done.stderr);
    }
    for name in ["alike", "others"] {
        let parts = ["parameter groups", "--no-opt-state"];
        fails(&ws, &format!("train --resume {name}.pt {TRAIN} --out no"), FAILURE, &parts);
        ws.ok(&format!("train --resume {name}.pt {TRAIN} --no_opt_state --out {name}"));
    }
    ws.ok("convert lr.pt eight.pt --optim adamw8bit");
    fails(&ws, "convert decay_first.pt no.pt --optim adamw8bit", FAILURE, &["parameter groups", "weight_decay"]);
}

/// field.md, row 1: archives without checksums are read; one wrong checksum among others is damage.
#[test]
fn a_checksum_of_zero_is_none_only_where_all_are() {
    let ws = Workspace::new();
    let mut bytes = fs::read(ws.path("golden.pt")).expect("reads");
    // The central directory's record of the first tensor, with its CRC-32 at 16.
    let name = bytes.windows(6).rposition(|window| window == b"data/0").expect("an entry");
    let record = bytes[..name].windows(4).rposition(|window| window == b"PK\x01\x02").expect("a record");
    bytes[record + 16..record + 20].fill(0);
    ws.write("zeroed.pt", bytes);
    fails(&ws, &format!("eval --ckpt zeroed.pt {EVAL}"), FAILURE, &["zeroed.pt", "damaged", "data/0"]);
}

/// field.md, row 9.
#[test]
fn an_optimizer_that_steps_by_another_rule_is_refused_by_that_word() {
    let ws = Workspace::new();
    torch(
        &ws,
        r#"
def third(c):
    for entry in c["opt"]["state"].values():
        entry["max_exp_avg_sq"] = entry["exp_avg_sq"].clone()
save("third.pt", third)
group = ("opt", "param_groups", 0)
save("amsgrad.pt", put(*group, "amsgrad", True))
save("maximize.pt", put(*group, "maximize", True))
save("coupled.pt", put(*group, "decoupled_weight_decay", False))
def adam(c):
    c["opt"]["param_groups"][0].update(decoupled_weight_decay=False, weight_decay=0)
save("same.pt", adam)
"#,
    );
    for (file, word) in [
        ("third.pt", "amsgrad"),
        ("amsgrad.pt", "amsgrad"),
        ("maximize.pt", "maximize"),
        ("coupled.pt", "decoupled_weight_decay"),
    ] {
        fails(&ws, &format!("train --resume {file} {TRAIN} --out no"), FAILURE, &[file, word, "--no-opt-state"]);
        fails(&ws, &format!("convert {file} no.pt --optim adamw8bit"), FAILURE, &[file, word]);
        ws.ok(&format!("train --resume {file} {TRAIN} --no_opt_state --out {file}.run"));
    }
    // Without decay Adam is AdamW.
    ws.ok(&format!("train --resume same.pt {TRAIN} --out same"));
}

/// features.md, F13: a checkpoint of 8-bit moments decides the optimizer.
#[test]
fn a_checkpoint_of_8_bit_moments_decides_the_optimizer_unless_it_is_set() {
    let ws = Workspace::new();
    let golden = Golden::open("bitbyte_tiny").dir.with_file_name("adamw8bit").join("ckpt.pt");
    fs::copy(golden, ws.path("eight.pt")).expect("copies");
    let line = format!("train --resume eight.pt {}", TRAIN.replace("--steps 21", "--steps 60"));
    let done = ws.ok(&format!("{line} --set train.stop_at=12 --out run"));
    assert!(done.stderr.contains("optim.name is adamw8bit"), "{}", done.stderr);
    assert!(ws.read("run/config.yaml").contains("name: adamw8bit"));
    fails(&ws, &format!("{line} --set optim.name=adamw --out no"), FAILURE, &["AdamW8bit", "--no-opt-state"]);
    // Without the state nothing is decided.
    ws.ok(&format!("{line} --set train.stop_at=12 --no_opt_state --out fresh"));
    assert!(ws.read("fresh/config.yaml").contains("name: adamw\n"));
}

// --- what a run goes on with --------------------------------------------------------------------------------

/// features.md, F1 and F2.
#[test]
fn every_checkpoint_has_a_scaler_that_pytorch_loads() {
    let ws = Workspace::new();
    for precision in ["fp32", "bf16"] {
        ws.ok(&format!("train --config tiny.yaml --set train.precision={precision} --steps 2 --out {precision}"));
        // One that came along goes along.
        let line = format!("train --resume golden.pt {TRAIN} --set train.precision={precision} --out with-{precision}");
        ws.ok(&line);
    }
    torch(
        &ws,
        r#"
fresh = torch.amp.GradScaler("cpu")
assert fresh.is_enabled()
came = golden()["scaler"]
assert came["scale"] == 32768.0
for precision in ["fp32", "bf16"]:
    for file, expected in [(f"{precision}/ckpt.pt", torch.amp.GradScaler("cpu").state_dict()), (f"with-{precision}/ckpt.pt", came)]:
        saved = torch.load(file)["scaler"]
        scaler = torch.amp.GradScaler("cpu")
        scaler.load_state_dict(saved)
        assert scaler.state_dict() == expected == saved, (file, saved, expected)
"#,
    );
}

/// features.md, F6.
#[test]
fn resuming_says_in_a_line_by_which_rule_the_checkpoint_was_trained() {
    let ws = Workspace::new();
    let base = "--data text.bin --seq_len 16 --batch_size 1 --steps 21 --device cpu";
    let lines = |done: &Done| {
        let said: Vec<_> = done.stderr.lines().filter(|line| line.contains("trained with")).map(String::from).collect();
        said
    };
    let said = lines(&ws.ok(&format!("train --resume golden.pt {base} --out a")));
    let [line] = &said[..] else { panic!("{said:?}") };
    for part in [
        "quant.ste clipped, quant.act_ste none, train.precision fp16",
        "identity, identity, bf16",
        "--set quant.ste=clipped --set quant.act_ste=none --set train.precision=fp16",
    ] {
        assert!(line.contains(part), "{part:?} in {line}");
    }
    // As the line says; or whatever else was asked for.
    let keep = "--set quant.ste=clipped --set quant.act_ste=none --set train.precision=fp16";
    for (index, set) in
        [keep, "--set quant.ste=identity --set quant.act_ste=identity --set train.precision=fp32"].iter().enumerate()
    {
        let done = ws.ok(&format!("train --resume golden.pt {base} {set} --set optim.weight_decay=0 --out b{index}"));
        assert_eq!(lines(&done), [""; 0], "{set}");
    }
    // A run of ours: the precision that it had is not the default.
    ws.ok("train --config tiny.yaml --set train.stop_at=2");
    assert_eq!(lines(&ws.ok("train --config tiny.yaml --set train.stop_at=3 --resume auto")), [""; 0]);
    let done =
        ws.ok("train --data text.bin --seq_len 16 --batch_size 2 --steps 6 --device cpu --out run --resume auto");
    let said = lines(&done);
    assert!(said.len() == 1 && said[0].contains("train.precision fp32") && said[0].contains("bf16"), "{said:?}");
}

/// field.md, row 41.
#[test]
fn other_data_under_a_resumed_position_are_told() {
    let ws = Workspace::new();
    let text = fs::read(ws.path("text.bin")).expect("reads");
    ws.write("same.bin", &text);
    ws.write("other.bin", text.iter().rev().copied().collect::<Vec<_>>());
    ws.write("short.bin", &text[..40]);
    ws.ok("train --config tiny.yaml --set train.stop_at=4");
    for (data, expected) in [
        ("same.bin", None),
        ("other.bin", Some("the place in them stays what it was")),
        ("short.bin", Some("a new pass over them begins")),
    ] {
        let line = format!("train --config tiny.yaml --resume run/ckpt.pt --data {data} --out {data}.run");
        let done = ws.ok(&line);
        let said = done.stderr.contains("holds other bytes than the checkpoint was trained on");
        assert_eq!(said, expected.is_some(), "{data}: {}", done.stderr);
        assert!(expected.is_none_or(|expected| done.stderr.contains(expected)), "{data}: {}", done.stderr);
    }
}

/// field.md, row 18.
#[test]
fn the_newest_checkpoint_that_is_whole_is_gone_on_from() {
    let ws = Workspace::new();
    ws.ok("train --config tiny.yaml --out straight");
    for length in [1000, 0] {
        let run = format!("run{length}");
        ws.ok(&format!("train --config tiny.yaml --set train.stop_at=4 --out {run}"));
        let newest = ws.path(format!("{run}/ckpt-00000004.pt"));
        fs::OpenOptions::new().write(true).open(newest).and_then(|file| file.set_len(length)).expect("cuts it");
        let done = ws.ok(&format!("eval --ckpt {run} --data text.bin --seq_len 16"));
        assert!(done.stderr.contains(&format!("{run}/ckpt-00000002.pt is older, and whole")), "{}", done.stderr);
        let done = ws.ok(&format!("train --config tiny.yaml --resume auto --out {run}"));
        for part in ["ckpt-00000004.pt", "ckpt-00000002.pt is older, and whole", "at step 2 of 6"] {
            assert!(done.stderr.contains(part), "{part} in {}", done.stderr);
        }
        assert_resumed_alike(&ws, &format!("{run}/ckpt.pt"), "straight/ckpt.pt");
        // None of them is whole: that is said of the newest.
        for name in ws.names(&run).iter().filter(|name| name.ends_with(".pt")) {
            ws.write(&format!("{run}/{name}"), b"PK\x03\x04");
        }
        let line = format!("train --config tiny.yaml --resume auto --out {run}");
        fails(&ws, &line, FAILURE, &["ckpt-00000006.pt", "damaged"]);
    }
}

/// features.md, F3.
#[test]
fn files_for_inference_are_read_as_they_are_meant() {
    let ws = Workspace::new();
    let printed = torch(
        &ws,
        r#"
sys.path.insert(0, repository + "/tests/python")
import bitbytelm
import torch.nn.functional as F
c = golden()
weights = {}
for name, w in c["model"].items():
    if name.startswith("blocks.") and w.dim() == 2:
        gamma = w.abs().mean().clamp(min=1e-8)
        w = (w / gamma).clamp(-1, 1).round() * gamma
    weights[name] = w
bitbytelm.ternary = lambda w, clipped: w
args = c["args"]
text = torch.tensor(list(open("text.bin", "rb").read()))[:961]
for file, kind in [("fast.pt", torch.float32), ("half.pt", torch.float16)]:
    cast = {name: w.to(kind) for name, w in weights.items()}
    cast["lm_head.weight"] = cast["tok_emb.weight"]
    torch.save({"format": "fast_ternary_v1", "model": cast, "args": args, "model_family": "bitbyte", "variant": "ar"}, file)
    model = bitbytelm.BitByteLM(args["n_layer"], args["d_model"], args["n_head"], args["d_ff"], act_quant=False)
    model.load_state_dict({name: w.float() for name, w in cast.items()})
    x, y = text[:-1].view(-1, 64), text[1:].view(-1, 64)
    with torch.no_grad():
        print(F.cross_entropy(model(x).flatten(0, 1), y.flatten()).item())
"#,
    );
    ws.write("part.bin", &fs::read(ws.path("text.bin")).expect("reads")[..961]);
    ws.ok("convert fast.pt fast.safetensors");
    let expected: Vec<f64> = printed.lines().map(|line| line.parse().expect("a number")).collect();
    for (file, expected) in [("fast.pt", expected[0]), ("half.pt", expected[1]), ("fast.safetensors", expected[0])] {
        let found = ws.ok(&format!("eval --ckpt {file} --data part.bin --seq_len 64 --json")).json();
        let found = found["loss"].as_f64().expect("a loss");
        assert!((found - expected).abs() < 1e-5 * expected, "{file}: {found}, PyTorch {expected}");
    }
    ws.ok("generate --ckpt fast.pt --prompt a --max_new_tokens 3");
    assert!(ws.ok("inspect fast.pt").text().contains("2 layers × 64"));
    for start in ["init", "resume"] {
        let parts = ["fast.pt", "fast_ternary_v1", "inference"];
        fails(&ws, &format!("train --{start} fast.pt {TRAIN} --no_opt_state --out no"), FAILURE, &parts);
    }
}

/// field.md, row 29.
#[test]
fn weights_or_a_loss_that_are_not_finite_are_no_result() {
    let ws = Workspace::new();
    torch(
        &ws,
        r#"
def broken(c):
    c["model"]["blocks.1.n2.weight"][3] = float("nan")
    c["model"]["norm_f.weight"][:2] = float("inf")
save("nan.pt", broken)
save("large.pt", lambda c: c["model"]["norm_f.weight"].fill_(3e38))
"#,
    );
    let parts = ["nan.pt", "3 of its 110912 weights are not finite", "blocks.1.n2.weight and 1 more"];
    for line in [
        format!("eval --ckpt nan.pt {EVAL}"),
        "eval --ckpt nan.pt --data text.bin --seq_len 64".into(),
        "generate --ckpt nan.pt --prompt a".into(),
        "generate --ckpt nan.pt --prompt a --json".into(),
        format!("train --init nan.pt {TRAIN} --out no"),
        format!("train --resume nan.pt {TRAIN} --out no"),
    ] {
        fails(&ws, &line, FAILURE, &parts);
    }
    // Finite weights, whose products are not.
    fails(&ws, &format!("eval --ckpt large.pt {EVAL}"), FAILURE, &["large.pt", "loss", "finite"]);
    fails(&ws, "generate --ckpt large.pt --prompt a --json", FAILURE, &["large.pt", "logits", "finite"]);
}

// --- files ------------------------------------------------------------------------------------------------

/// field.md, row 28.
#[test]
fn a_file_is_judged_by_its_content() {
    let ws = Workspace::new();
    ws.ok("convert golden.pt golden.safetensors");
    let expected = loss(&ws, "golden.pt", "");
    let copies = [
        ("golden.pt", ["pytorch_model.bin", "MODEL.PT", "ckpt.pt.bak", "checkpoint", "misnamed.safetensors"]),
        ("golden.safetensors", ["model.bin", "misnamed.pt", "MODEL.SAFETENSORS", "weights", "model.st"]),
    ];
    for (from, names) in copies {
        for name in names {
            fs::copy(ws.path(from), ws.path(name)).expect("copies");
            let shown = ws.ok(&format!("inspect {name}")).text();
            assert!(shown.contains("blocks.1.mlp.down.weight"), "{name}: {shown}");
            assert_eq!(loss(&ws, name, ""), expected, "{name}");
            ws.ok(&format!("convert {name} out.pt --allow_overwrite"));
            assert_eq!(loss(&ws, "out.pt", ""), expected, "{name}");
        }
    }
    // Bytes to train on are still that.
    assert!(ws.ok("inspect text.bin").text().contains("1 shards, 16800 bytes"));
}

#[test]
fn what_is_no_regular_file_is_named_as_such_at_once() {
    let ws = Workspace::new();
    ws.write("empty.pt", b"");
    ws.write("empty", b"");
    fs::create_dir(ws.path("folder.pt")).expect("creates");
    let done = Running::start(ws.shell("mkfifo pipe.pt pipe")).wait();
    assert_eq!(done.status, Some(0), "{}", done.stderr);
    for (file, word) in [("pipe.pt", "pipe"), ("pipe", "pipe"), ("empty.pt", "empty"), ("/dev/null", "device")] {
        for line in [
            format!("eval --ckpt {file} {EVAL}"),
            format!("train --resume {file} {TRAIN} --out no"),
            format!("train --init {file} {TRAIN} --out no"),
            format!("convert {file} out.safetensors"),
            format!("inspect {file}"),
        ] {
            fails(&ws, &line, FAILURE, &[file, word]);
        }
    }
    fails(&ws, "inspect empty", FAILURE, &["empty"]);
    fails(&ws, "convert folder.pt out.safetensors", FAILURE, &["folder.pt", "is a directory"]);
    fails(&ws, "train --init folder.pt --out no", FAILURE, &["folder.pt", "is a directory"]);
}

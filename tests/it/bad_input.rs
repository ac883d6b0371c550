//! Bad input: each gets one clear message that names the file, key or flag and what to do, the right exit
//! status, and nothing is lost or half-written.

use std::ffi::OsStr;
use std::fs;

use crate::common::cli::{Done, Running, Workspace};
use bbt::checkpoint::{Dtype, Storage, TensorData, Value, torch_file};

/// Status of what the command line or the configuration says wrongly.
const USAGE: i32 = 2;
/// Status of everything else.
const FAILURE: i32 = 1;

/// What every failure looks like: one message that says whose it is, and neither a panic nor C++ frames.
fn assert_clear(done: &Done, status: i32, parts: &[&str]) {
    let text = &done.stderr;
    assert_eq!(done.status, Some(status), "{text}");
    assert_eq!(done.text(), "", "stdout is for results");
    let message = text.lines().skip_while(|line| !line.starts_with("bbt: ")).collect::<Vec<_>>();
    assert!((1..=4).contains(&message.len()), "one short message, at the end: {text}");
    assert_eq!(text.matches("bbt: ").count(), 1, "{text}");
    for part in parts {
        assert!(message.join("\n").contains(part), "{part:?} in {text}");
    }
    for part in ["panicked", "backtrace", "internal failure", "unwrap", "frame #", "\x1b"] {
        assert!(!text.contains(part), "{part:?} in {text}");
    }
}

/// Runs `line`, which must fail with that status and those words, and change no file.
fn fails(ws: &Workspace, line: &str, status: i32, parts: &[&str]) {
    let before = ws.snapshot();
    let done = ws.bbt(line);
    assert_clear(&done, status, parts);
    let after = ws.snapshot();
    assert!(after.keys().eq(before.keys()), "bbt {line}: {:?} were {:?}", after.keys(), before.keys());
    assert!(after == before, "bbt {line} changed a file");
}

/// Runs `line`, which clap refuses: its messages begin with `error: `.
fn refuses(ws: &Workspace, line: &str, parts: &[&str]) {
    let before = ws.snapshot();
    let done = ws.bbt(line);
    assert_eq!((done.status, done.text().as_str()), (Some(USAGE), ""), "bbt {line}: {}", done.stderr);
    for part in parts.iter().chain(&["error: "]) {
        assert!(done.stderr.contains(part), "{part:?} in {}", done.stderr);
    }
    assert!(ws.snapshot() == before, "bbt {line} changed a file");
}

// --- configuration --------------------------------------------------------------------------------

#[test]
fn a_yaml_file_with_mistakes() {
    let ws = Workspace::new();
    let files: [(&str, &[u8], &[&str]); 11] = [
        ("unknown", b"model:\n  n_layer: 2\n  n_layr: 3\n", &["n_layr", "line 3", "n_layer"]),
        ("section", b"model: {n_layer: 2}\noptimizer: {lr: 1}\n", &["optimizer", "line 2", "optim"]),
        ("type", b"\noptim:\n  lr: fast\n", &["optim.lr", "line 3"]),
        ("negative", b"train:\n  steps: -1\n", &["train.steps", "line 2"]),
        ("choice", b"quant: {ste: sometimes}\n", &["quant.ste", "sometimes", "identity", "clipped"]),
        ("twice", b"optim: {lr: 1}\noptim: {lr: 2}\n", &["optim", "line 2"]),
        ("prefix", b"model: {n_layer: 2}\nmod: {n_layer: 2}\n", &["`mod`", "line 2"]),
        ("syntax", b"model: {n_layer: 2\ntrain: [\n", &["line"]),
        ("scalar", b"hello\n", &["hello"]),
        ("bytes", b"model: {n_layer: \xff}\n", &["UTF-8"]),
        ("both", b"data: {seq_len: 1, curriculum: [[0.0, 2]]}\n", &["data.seq_len", "data.curriculum"]),
    ];
    for (name, text, parts) in files {
        let file = format!("{name}.yaml");
        ws.write(&file, text);
        fails(&ws, &format!("config --config {file}"), USAGE, &[parts, &[&file]].concat());
    }
    // The other commands that take one say the same.
    fails(&ws, "train --config unknown.yaml --data text.bin --out x", USAGE, &["unknown.yaml", "n_layr", "line 3"]);
    fails(&ws, "config --config absent.yaml", USAGE, &["absent.yaml", "No such file"]);
}

#[test]
fn values_out_of_range() {
    let ws = Workspace::new();
    // One of each kind; the unit tests of the configuration have them all.
    for (set, key) in [
        ("model.d_model=9223372036854775807", "model.d_model"),
        ("optim.lr=.nan", "optim.lr"),
        ("data.curriculum=[[0.0,16],[0.5,0]]", "data.curriculum"),
        ("train.steps=0", "train.steps"),
        ("train.out=''", "train.out"),
        ("optim.decay_frac=1.5", "optim.decay_frac"),
        ("optim.stage_frac=2", "optim.stage_frac"),
        ("optim.stage_lr_factor=-1", "optim.stage_lr_factor"),
        ("optim.decay=norms", "matrices"),
        ("optim.schedule=linear", "two_stage"),
        ("quant.start_frac=1", "quant.start_frac"),
    ] {
        fails(&ws, &format!("train --config tiny.yaml --set {set}"), USAGE, &[key]);
    }
}

#[test]
fn heads_that_do_not_divide() {
    let ws = Workspace::new();
    let train = "train --config tiny.yaml";
    fails(&ws, &format!("{train} --n_head 5"), USAGE, &["model.n_head", "5", "model.d_model", "32"]);
    fails(&ws, &format!("{train} --n_head 32"), USAGE, &["model.n_head", "even"]);
    fails(&ws, &format!("{train} --n_head 4 --n_kv_head 3"), USAGE, &["model.n_kv_head", "3", "model.n_head", "4"]);
}

#[test]
fn flags_with_mistakes() {
    let ws = Workspace::new();
    ws.write("empty", b"");
    ws.write("run/ckpt.pt", b"");
    for (line, parts) in [
        ("config --set optim.lrr=1", &["--set optim.lrr=1", "lrr", "lr"][..]),
        ("config --set lr=1", &["--set lr=1", "section.key"]),
        ("config --set optim.lr", &["--set optim.lr", "section.key=value"]),
        ("config --set optim.lr=fast", &["--set optim.lr=fast", "fast"]),
        ("config --lr_schedule linear", &["--lr-schedule", "linear", "cosine", "constant"]),
        ("config --seq_len_cap 0", &["--seq-len-cap", "0"]),
    ] {
        fails(&ws, line, USAGE, parts);
    }
    for (line, parts) in [
        ("train --n_layers 3", &["--n_layers", "--n-layer"][..]),
        ("train --steps many", &["--steps", "many"]),
        ("train --device tpu", &["--device", "tpu", "cuda:N"]),
        ("eval --ckpt golden.pt --data text.bin", &["--seq-len"]),
        ("eval --ckpt golden.pt --data text.bin --seq_len 0", &["--seq-len"]),
        ("generate --ckpt golden.pt --prompt a --prompt-file b", &["--prompt"]),
        ("pack text.bin --out x --shard_size big", &["--shard-size", "64K"]),
        ("trian", &["trian", "train"]),
    ] {
        refuses(&ws, line, parts);
    }
    for (line, parts) in [
        ("eval --ckpt golden.pt --data text.bin --seq_len 16 --stride 17", &["--stride", "17", "--seq-len", "16"][..]),
        ("generate --ckpt golden.pt --prompt a --temperature=-1", &["--temperature", "-1"]),
        ("generate --ckpt golden.pt --prompt a --top_p 0", &["--top-p"]),
        ("generate --ckpt golden.pt", &["--prompt"]),
        ("train --config tiny.yaml --resume auto --allow_overwrite", &["--resume auto", "--allow-overwrite"]),
        ("generate --ckpt golden.pt --prompt-file empty", &["prompt", "empty"]),
    ] {
        fails(&ws, line, USAGE, parts);
    }
    fails(&ws, "generate --ckpt golden.pt --prompt-file absent", FAILURE, &["--prompt-file", "absent"]);
}

#[test]
fn a_log_level_that_there_is_not() {
    let ws = Workspace::new();
    for value in ["bogus", "bogus["] {
        let mut command = ws.command(&[OsStr::new("config")]);
        command.env("BBT_LOG", value);
        assert_clear(&Running::start(command).wait(), USAGE, &["BBT_LOG", value, "debug"]);
    }
}

// --- data -----------------------------------------------------------------------------------------

#[test]
fn data_that_cannot_be_trained_on() {
    let ws = Workspace::new();
    fs::create_dir(ws.path("bare")).expect("creates");
    ws.write("empty/shard_00000.bin", b"");
    ws.write("short/shard_00000.bin", [b'x'; 100]);
    ws.write("short/shard_00001.bin", [b'x'; 16]);
    ws.write("notes/a.txt", b"text");
    // A run that is there already must survive every one of these.
    ws.ok("train --config tiny.yaml");
    let cases: [(&str, &[&str]); 6] = [
        ("absent", &["absent", "no such file", "bbt pack"]),
        ("bare", &["bare", "shard_*.bin", "bbt pack"]),
        ("notes", &["notes", "shard_*.bin", "a.txt"]),
        ("absent/*.bin", &["absent/*.bin", "no file matches"]),
        ("empty", &["empty/shard_00000.bin", "empty"]),
        ("short", &["short/shard_00001.bin", "16 bytes", "17", "data.seq_len"]),
    ];
    for (data, parts) in cases {
        let line = format!("train --config tiny.yaml --data {data} --allow_overwrite");
        fails(&ws, &line, FAILURE, &[parts, &["data.train"]].concat());
    }
    for (data, parts) in &cases[..5] {
        let line = format!("eval --ckpt golden.pt --data {data} --seq_len 16");
        fails(&ws, &line, FAILURE, &[*parts, &["--data"]].concat());
    }
    let line = "train --config tiny.yaml --set data.val=empty --set train.eval_every=2 --out fresh";
    fails(&ws, line, FAILURE, &["data.val", "empty/shard_00000.bin"]);
    for out in ["fresh", "run --resume run/ckpt-00000004.pt"] {
        let line = format!("train --config tiny.yaml --data absent --out {out}");
        fails(&ws, &line, FAILURE, &["data.train", "absent"]);
    }
    // The longest window of the curriculum counts, before anything is trained.
    let line = "train --config tiny.yaml --set data.curriculum=[[0.0,16],[0.5,20000]] --out fresh";
    fails(&ws, line, FAILURE, &["data.train", "text.bin", "20001", "data.curriculum"]);
    ws.write("one.bin", b"x");
    fails(&ws, "eval --ckpt golden.pt --data one.bin --seq_len 16", FAILURE, &["--data", "one.bin"]);
}

#[test]
fn input_that_cannot_be_packed() {
    let ws = Workspace::new();
    ws.write("notes/a.txt", b"text");
    fs::create_dir(ws.path("bare")).expect("creates");
    fails(&ws, "pack absent --out corpus", FAILURE, &["absent"]);
    fails(&ws, "pack bare --out corpus", FAILURE, &["bare", "no file"]);
    fails(&ws, "pack notes --out corpus --ext rs", FAILURE, &["notes", "rs"]);
    fails(&ws, "pack notes --out corpus --val_frac 0.9", USAGE, &["val", "0.9", "0.5"]);
    fails(&ws, "pack notes --out corpus --shard_size 1", USAGE, &["shard", "4"]);
    // An existing output; and, allowed to overwrite, a directory that is no output of `bbt pack`.
    ws.ok("pack notes --out corpus");
    fails(&ws, "pack notes --out corpus", FAILURE, &["corpus", "exists", "overwrit"]);
    fails(&ws, "pack text.bin --out notes --allow_overwrite", FAILURE, &["notes", "bbt pack"]);
    ws.ok("pack text.bin --out corpus --allow_overwrite");
}

// --- checkpoints ----------------------------------------------------------------------------------

/// Every command that reads a checkpoint, with `FILE` for its name.
const READERS: [&str; 6] =
    [RESUME, INIT, EVAL, "generate --ckpt FILE --prompt a", "convert FILE out.safetensors", "inspect FILE"];
const RESUME: &str = "train --resume FILE --data text.bin --seq_len 16 --batch_size 1 --steps 30 --out next";
const INIT: &str = "train --init FILE --data text.bin --seq_len 16 --batch_size 1 --steps 30 --out next";
const EVAL: &str = "eval --ckpt FILE --data text.bin --seq_len 16";

fn no_reader_takes(ws: &Workspace, file: &str, parts: &[&str]) {
    for line in READERS {
        fails(ws, &line.replace("FILE", file), FAILURE, &[parts, &[file]].concat());
    }
}

#[test]
fn files_that_are_no_checkpoint() {
    let ws = Workspace::new();
    ws.write("empty.pt", b"");
    ws.write("text.pt", "Once upon a time\n".repeat(100));
    ws.write("text.safetensors", "Once upon a time\n".repeat(100));
    fs::create_dir(ws.path("bare")).expect("creates");
    for file in ["empty.pt", "text.pt", "text.safetensors", "bare"] {
        fails(&ws, &EVAL.replace("FILE", file), FAILURE, &[file]);
    }
    no_reader_takes(&ws, "absent.pt", &["No such file"]);
}

#[test]
fn truncated_checkpoints() {
    let ws = Workspace::new();
    ws.ok("convert golden.pt golden.safetensors");
    for file in ["golden.pt", "golden.safetensors"] {
        let whole = fs::read(ws.path(file)).expect("reads");
        for (index, length) in [10, whole.len() / 2, whole.len() - 1].into_iter().enumerate() {
            let cut = format!("cut{index}-{file}");
            ws.write(&cut, &whole[..length]);
            fails(&ws, &EVAL.replace("FILE", &cut), FAILURE, &[&cut]);
        }
    }
    no_reader_takes(&ws, "cut1-golden.pt", &[]);
}

/// `golden.pt` with a change to its top-level keys, as `name`.
fn altered(ws: &Workspace, name: &str, change: impl FnOnce(&mut Vec<(Value, Value)>)) {
    let Value::Dict(mut entries) = torch_file::read(&ws.path("golden.pt")).expect("reads") else {
        panic!("a checkpoint is a dict");
    };
    change(&mut entries);
    torch_file::write(&ws.path(name), &Value::Dict(entries)).expect("writes");
}

fn entry<'a>(entries: &'a mut [(Value, Value)], key: &str) -> &'a mut Value {
    let found = entries.iter_mut().find(|(k, _)| k.as_str() == Some(key));
    &mut found.unwrap_or_else(|| panic!("has {key}")).1
}

#[test]
fn checkpoints_of_another_model() {
    let ws = Workspace::new();
    let text = |text: &str| Value::Str(text.into());
    altered(&ws, "family.pt", |entries| *entry(entries, "model_family") = text("llama"));
    altered(&ws, "variant.pt", |entries| *entry(entries, "variant") = text("diffusion"));
    altered(&ws, "nomodel.pt", |entries| entries.retain(|(key, _)| key.as_str() != Some("model")));
    altered(&ws, "noargs.pt", |entries| entries.retain(|(key, _)| key.as_str() != Some("args")));
    altered(&ws, "layers.pt", |entries| {
        let Value::Dict(args) = entry(entries, "args") else { panic!("args is a dict") };
        *entry(args, "n_layer") = Value::Int(3);
    });
    altered(&ws, "width.pt", |entries| {
        let Value::Dict(args) = entry(entries, "args") else { panic!("args is a dict") };
        *entry(args, "d_ff") = Value::Int(96);
    });
    altered(&ws, "huge.pt", |entries| {
        let Value::Dict(args) = entry(entries, "args") else { panic!("args is a dict") };
        *entry(args, "n_layer") = Value::Int(i64::MAX);
    });
    altered(&ws, "untied.pt", |entries| {
        let head = entry(entries, "model").get_mut("lm_head.weight").expect("has a head");
        let Value::Tensor(tensor) = &*head else { panic!("a tensor") };
        let mut bytes = tensor.contiguous_bytes().into_owned();
        bytes[0] ^= 1;
        *head = Value::Tensor(TensorData::contiguous(Storage::new(Dtype::F32, bytes), tensor.shape.clone()));
    });
    altered(&ws, "more.pt", |entries| {
        let Value::OrderedDict { items, .. } = entry(entries, "model") else { panic!("a state_dict") };
        let (_, norm) = items.iter().find(|(key, _)| key.as_str() == Some("norm_f.weight")).expect("has a norm");
        let further = (text("blocks.0.attn.scale"), norm.clone());
        items.push(further);
    });
    for (file, parts) in [
        ("untied.pt", &["lm_head.weight differs from tok_emb.weight"][..]),
        ("more.pt", &["unexpected blocks.0.attn.scale"]),
        ("family.pt", &["llama", "bitbyte"]),
        ("variant.pt", &["diffusion", "ar"]),
        ("nomodel.pt", &["`model`"]),
        ("noargs.pt", &["--n_head"]),
        ("layers.pt", &["blocks.2."]),
        ("width.pt", &["blocks.0.mlp.gate_up.weight", "320", "192"]),
        ("huge.pt", &["model.n_layer"]),
    ] {
        let parts = [parts, &[file]].concat();
        fails(&ws, &EVAL.replace("FILE", file), FAILURE, &parts);
    }
}

#[test]
fn a_shape_that_contradicts_the_checkpoint() {
    let ws = Workspace::new();
    let base = "--data text.bin --seq_len 16 --batch_size 1 --steps 30 --out next";
    for (flag, key, has) in [
        ("--d_model 32", "model.d_model", "64"),
        ("--n_kv_head 2", "model.n_kv_head", "4"),
        ("--d_ff 96", "model.d_ff", "160"),
    ] {
        fails(&ws, &format!("train --resume golden.pt {base} {flag}"), USAGE, &[key, has, "checkpoint"]);
    }
    fails(&ws, &format!("train --config tiny.yaml --init golden.pt {base}"), USAGE, &["model.d_model", "32", "64"]);
}

#[test]
fn weights_of_another_dtype() {
    let ws = Workspace::new();
    ws.ok("convert golden.pt half.safetensors --dtype bf16");
    ws.ok("convert golden.pt half.pt --dtype fp16");
    for (file, dtype) in [("half.safetensors", "BF16"), ("half.pt", "F16")] {
        let line = INIT.replace("FILE", file);
        fails(&ws, &line, FAILURE, &[file, dtype, "tok_emb.weight", "fp32", "bbt convert"]);
    }
}

#[test]
fn an_optimizer_state_that_is_missing_or_anothers() {
    let ws = Workspace::new();
    ws.ok("convert golden.pt weights.safetensors");
    altered(&ws, "none.pt", |entries| entries.retain(|(key, _)| key.as_str() != Some("opt")));
    altered(&ws, "null.pt", |entries| *entry(entries, "opt") = Value::None);
    altered(&ws, "fewer.pt", |entries| {
        let Value::Dict(opt) = entry(entries, "opt") else { panic!("opt is a dict") };
        let Value::Dict(state) = entry(opt, "state") else { panic!("state is a dict") };
        state.pop();
    });
    altered(&ws, "sgd.pt", |entries| {
        let Value::Dict(opt) = entry(entries, "opt") else { panic!("opt is a dict") };
        let Value::Dict(state) = entry(opt, "state") else { panic!("state is a dict") };
        for (_, of_one) in state {
            let Value::Dict(of_one) = of_one else { panic!("each is a dict") };
            of_one.retain(|(key, _)| key.as_str() == Some("step"));
        }
    });
    // Moments of zero at step 20, or for one parameter, would be another run without a word.
    altered(&ws, "emptied.pt", |entries| {
        *entry(entries, "opt").get_mut("state").expect("has a state") = Value::Dict(vec![]);
    });
    altered(&ws, "group.pt", |entries| {
        let Some(Value::List(groups)) = entry(entries, "opt").get_mut("param_groups") else { panic!("has groups") };
        let Some(Value::List(numbers)) = groups[0].get_mut("params") else { panic!("has parameters") };
        numbers.pop();
    });
    let adamw8bit = crate::common::Golden::open("bitbyte_tiny").dir.with_file_name("adamw8bit").join("ckpt.pt");
    fs::copy(adamw8bit, ws.path("adamw8bit.pt")).expect("copies");
    for (file, parts) in [
        ("weights.safetensors", &["optimizer state"][..]),
        ("none.pt", &["optimizer state", "opt"]),
        ("null.pt", &["optimizer state", "opt"]),
        ("fewer.pt", &["no state for parameter"]),
        ("emptied.pt", &["no state for parameter"]),
        ("group.pt", &["17 parameters", "18"]),
        ("sgd.pt", &["exp_avg", "AdamW"]),
        ("adamw8bit.pt", &["AdamW8bit"]),
    ] {
        let line = format!("{} --set optim.name=adamw", RESUME.replace("FILE", file));
        fails(&ws, &line, FAILURE, &[parts, &[file, "--no-opt-state", "--init"]].concat());
    }
    // What the message says helps: that way there is a run.
    for (file, flag) in [("none.pt", "--resume none.pt --no_opt_state"), ("sgd.pt", "--init sgd.pt")] {
        let flags = "--data text.bin --seq_len 16 --batch_size 1 --steps 21 --device cpu";
        ws.ok(&format!("train {flag} {flags} --out after/{file}/ckpt.pt"));
    }
}

#[test]
fn a_global_that_is_not_allowed_is_named_and_not_called() {
    let ws = Workspace::new();
    let script = include_str!("../python/forbidden_globals.py");
    let dir = ws.path("");
    crate::common::python(&[OsStr::new("-c"), OsStr::new(script), dir.as_os_str()]);
    for line in [RESUME, EVAL, "convert FILE out.safetensors", "inspect FILE"] {
        fails(&ws, &line.replace("FILE", "evil.pt"), FAILURE, &["evil.pt", "mkdir"]);
    }
    assert!(!ws.path("called").exists());
    fails(&ws, "inspect date.pt", FAILURE, &["date.pt", "datetime.date"]);
    fails(&ws, "inspect old.pt", FAILURE, &["old.pt"]);
}

// --- output ---------------------------------------------------------------------------------------

#[test]
fn an_existing_output_is_not_overwritten_unasked() {
    let ws = Workspace::new();
    ws.ok("train --config tiny.yaml");
    let run = ["run holds a run already", "--resume auto", "--allow-overwrite", "--out"];
    fails(&ws, "train --config tiny.yaml", FAILURE, &run);
    fails(&ws, "train --config tiny.yaml --out run/ckpt.pt", FAILURE, &run);
    fails(&ws, "train --config tiny.yaml --init golden.pt --d_model 64 --n_head 4 --d_ff 160", FAILURE, &run);
    ws.ok("train --config tiny.yaml --out other --set train.stop_at=2");
    fails(&ws, "train --config tiny.yaml --resume other/ckpt.pt", FAILURE, &run);
    ws.ok("train --config tiny.yaml --allow_overwrite --steps 2");
    assert_eq!((ws.numbered("run", "ckpt"), ws.losses("run/metrics.jsonl").len()), (vec![2], 2));

    ws.ok("convert golden.pt out.safetensors");
    fails(&ws, "convert golden.pt out.safetensors", FAILURE, &["out.safetensors", "exists", "--allow-overwrite"]);
    ws.ok("convert golden.pt out.safetensors --allow_overwrite");
    fails(&ws, "convert golden.pt out.onnx", FAILURE, &["out.onnx", ".pt", ".safetensors"]);
}

/// `line` with a limit on the size of files, in KiB: what the kernel says past it (EFBIG) reaches bbt where a full
/// disk's ENOSPC would.
fn limited(ws: &Workspace, kib: u32, line: &str) -> Done {
    Running::start(ws.shell(&format!("trap '' XFSZ; ulimit -f {kib}; exec bbt {line}"))).wait()
}

#[test]
fn a_full_disk_while_saving() {
    let ws = Workspace::new();
    // A checkpoint takes about 350 KiB. The first save: nothing is left of it.
    let done = limited(&ws, 100, "train --config tiny.yaml --out fresh");
    assert_clear(&done, FAILURE, &["fresh/ckpt-00000002.pt", "File too large"]);
    let names = ws.names("fresh");
    let unexpected: Vec<_> =
        names.iter().filter(|n| *n != "config.yaml" && *n != "metrics.jsonl" && !n.starts_with("events.")).collect();
    assert_eq!(unexpected, [""; 0], "{names:?}");

    // A later one: the last good checkpoint is as it was, and is what the run goes on from.
    ws.ok("train --config tiny.yaml --out run --set train.stop_at=3");
    let checkpoints = || ws.snapshot().into_iter().filter(|(path, _)| path.extension() == Some(OsStr::new("pt")));
    let (before, names) = (checkpoints().collect::<Vec<_>>(), ws.names("run"));
    let done = limited(&ws, 100, "train --config tiny.yaml --out run --resume auto");
    assert_clear(&done, FAILURE, &["run/ckpt-00000004.pt", "File too large"]);
    assert!(checkpoints().eq(before), "{:?}", ws.names("run"));
    let left = ws.names("run").into_iter().filter(|n| !n.starts_with("events."));
    assert!(left.eq(names.into_iter().filter(|n| !n.starts_with("events."))), "{:?}", ws.names("run"));
    ws.ok("train --config tiny.yaml --out run --resume auto");
    assert_eq!(ws.losses("run/metrics.jsonl").into_keys().collect::<Vec<_>>(), (0..6).collect::<Vec<_>>());
}

#[test]
fn a_full_disk_while_writing_other_files() {
    let ws = Workspace::new();
    ws.ok("train --config tiny.yaml");
    let before = ws.snapshot();
    for (line, parts) in [
        ("pack text.bin --out corpus", &["corpus", "File too large"][..]),
        ("convert golden.pt out.safetensors", &["out.safetensors", "File too large"]),
        ("convert golden.pt out.pt", &["out.pt", "File too large"]),
        ("plot run --out loss.png", &["loss.png", "File too large"]),
    ] {
        assert_clear(&limited(&ws, 4, line), FAILURE, parts);
        assert!(ws.snapshot() == before, "bbt {line} left {:?}", ws.names("."));
    }
    // Standard output can be full, too.
    for line in ["config", "eval --ckpt golden.pt --data text.bin --seq_len 16 --max_bytes 100 --json"] {
        let done = Running::start(ws.shell(&format!("exec bbt {line} > /dev/full"))).wait();
        assert_clear(&done, FAILURE, &["No space left on device"]);
    }
}

#[test]
fn a_directory_that_cannot_be_written() {
    let ws = Workspace::new();
    ws.ok("train --config tiny.yaml");
    // The kernel's own directory takes no file, whoever asks.
    for (line, parts) in [
        ("train --config tiny.yaml --out /proc/run", &["/proc/run", "--out"][..]),
        ("train --config tiny.yaml --out /proc/model.pt", &["/proc", "--out"]),
        ("train --config tiny.yaml --out text.bin/run", &["text.bin/run", "--out"]),
        ("train --config tiny.yaml --out text.bin", &["text.bin", "--out"]),
        ("pack text.bin --out /proc/corpus", &["/proc"]),
        ("convert golden.pt /proc/out.safetensors", &["/proc/out.safetensors"]),
        ("plot run --out /proc/loss.png", &["/proc/loss.png"]),
    ] {
        fails(&ws, line, FAILURE, parts);
    }
}

#[test]
fn logs_that_cannot_be_drawn_or_continued() {
    let ws = Workspace::new();
    ws.write("empty/metrics.jsonl", b"");
    ws.write("broken/metrics.jsonl", b"{\"step\": 0}\n{\"step\": 1}\n");
    ws.ok("train --config tiny.yaml --set train.stop_at=3");
    fails(&ws, "plot absent", FAILURE, &["absent", "No such file"]);
    fails(&ws, "plot empty", FAILURE, &["empty"]);
    fails(&ws, "plot broken", FAILURE, &["broken/metrics.jsonl:1"]);
    fails(&ws, "plot run --out loss.jpg", FAILURE, &["loss.jpg", ".png"]);
    fails(&ws, "plot --schedule tiny.yaml --out plan.jpg", FAILURE, &["plan.jpg", ".png"]);
    fails(&ws, "plot --schedule absent.yaml", USAGE, &["absent.yaml", "No such file"]);
    fails(&ws, "plot --schedule tiny.yaml --set optim.decay_frac=2", USAGE, &["optim.decay_frac"]);
    refuses(&ws, "plot run --schedule tiny.yaml", &["--schedule"]);
    refuses(&ws, "plot run --steps 3", &["--steps"]);
    refuses(&ws, "plot", &["<RUN>"]);
    fails(&ws, "plot run --internals", FAILURE, &["run", "train.internals_every"]);
    fails(&ws, "plot run run --internals", USAGE, &["--internals", "one run"]);
    let log = ws.read("run/metrics.jsonl");
    ws.write("run/metrics.jsonl", format!("not a row\n{log}"));
    let done = ws.bbt("train --config tiny.yaml --resume auto");
    assert_clear(&done, FAILURE, &["run/metrics.jsonl:1", "delete this line"]);
    assert_eq!(ws.read("run/metrics.jsonl"), format!("not a row\n{log}"));
}

// --- machine and numbers --------------------------------------------------------------------------

#[test]
fn cuda_that_is_not_there() {
    let ws = Workspace::new();
    ws.ok("train --config tiny.yaml");
    let before = ws.snapshot();
    for (line, device) in [
        ("train --config tiny.yaml --allow_overwrite", "cuda"),
        ("train --config tiny.yaml --out fresh", "cuda:3"),
        ("eval --ckpt golden.pt --data text.bin --seq_len 16", "cuda:1"),
        ("generate --ckpt golden.pt --prompt a", "cuda"),
    ] {
        // Hidden, on a machine that has one.
        let hidden = format!("CUDA_VISIBLE_DEVICES= exec bbt {line} --device {device}");
        let done = Running::start(ws.shell(&hidden)).wait();
        assert_clear(&done, FAILURE, &[device, "CUDA", "cpu", "auto", "bbt doctor"]);
        assert!(ws.snapshot() == before, "bbt {line} changed a file");
    }
}

#[test]
fn a_model_that_does_not_fit_in_memory() {
    let ws = Workspace::new();
    ws.ok("train --config tiny.yaml");
    let needs = ["GiB", "parameters", "model.d_model", "model.n_layer"];
    for flags in [
        "--n_layer 1048576 --d_model 1048576 --n_head 1024 --d_ff 1048576 --out fresh",
        "--n_layer 1000 --d_model 100000 --n_head 100 --d_ff 400000 --allow_overwrite",
    ] {
        fails(&ws, &format!("train --config tiny.yaml {flags}"), FAILURE, &needs);
    }
    // The same where the model is small and the batch is not.
    for flags in ["--batch_size 1000000000", "--batch_size 9223372036854775807 --grad_accum 9223372036854775807"] {
        let parts = ["GiB", "activations", "train.batch_size", "data.seq_len"];
        fails(&ws, &format!("train --config tiny.yaml --out fresh {flags}"), FAILURE, &parts);
    }
}

#[test]
fn a_loss_that_is_not_finite() {
    let ws = Workspace::new();
    ws.ok("train --config tiny.yaml --set train.stop_at=3");
    let good = fs::read(ws.path("run/ckpt-00000003.pt")).expect("reads");
    let line = "train --config tiny.yaml --steps 1000000 --lr 1e38 --warmup_steps 0 --set train.max_nonfinite=3 \
                --resume auto";
    let done = ws.bbt(&format!("{line} --save_every 0"));
    assert_clear(&done, FAILURE, &["3 steps in a row", "not finite", "run/ckpt", "optim.lr", "train.max_nonfinite"]);
    assert!(done.stderr.contains("step skipped"), "each is reported: {}", done.stderr);
    for name in ["ckpt.pt", "ckpt-00000003.pt"] {
        assert!(fs::read(ws.path("run").join(name)).expect(name) == good, "{name} is as it was");
    }
    let rows = ws.rows("run/metrics.jsonl");
    assert_eq!(rows.last().map(|row| row["skipped_steps"].clone()), Some(3.into()), "counted and logged");
    assert!(rows.iter().any(|row| row["loss"].is_null() || row["grad_norm"].is_null()), "{rows:?}");

    // As the message says: with a smaller learning rate the run goes on from there.
    ws.ok("train --config tiny.yaml --resume run/ckpt.pt");
    assert_eq!(ws.losses("run/metrics.jsonl").into_keys().collect::<Vec<_>>(), (0..6).collect::<Vec<_>>());

    // Saving every step: a checkpoint from before it went wrong is still there, however many steps were skipped
    // since, and a run from it is sound.
    ws.ok("train --config tiny.yaml --set train.stop_at=3 --out other");
    let done = ws.bbt(&format!("{line} --save_every 1 --set train.max_nonfinite=9 --out other"));
    assert_clear(&done, FAILURE, &["9 steps in a row"]);
    assert!(ws.numbered("other", "ckpt").contains(&3), "{:?}", ws.names("other"));
    ws.ok("train --config tiny.yaml --resume other/ckpt-00000003.pt --out other");
    assert!(ws.losses("other/metrics.jsonl").into_values().eq(ws.losses("run/metrics.jsonl").into_values()));
}

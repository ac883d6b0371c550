//! What a user does with `bbt`, subcommand by subcommand: files, output, exit status.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use crate::common::cli::{Done, Running, Workspace};
use crate::common::{Golden, can_run, shell_can};
use bbt::checkpoint::{TrainingCheckpoint, torch_file};
use bbt::config::Config;

/// What was logged of each step must have these.
const KEYS: [&str; 8] =
    ["step", "loss", "bits_per_byte", "lr", "grad_norm", "seq_len", "bytes_seen", "bytes_per_second"];

/// The command that a stopped run says would continue it.
fn resume_command(done: &Done) -> String {
    let line = done.stderr.lines().find_map(|line| line.strip_prefix("to go on: "));
    line.unwrap_or_else(|| panic!("says how to resume: {}", done.stderr)).to_string()
}

// --- train ----------------------------------------------------------------------------------------

#[test]
fn training_fills_the_run_directory() {
    let ws = Workspace::new();
    let flags = "--config tiny.yaml --set data.val=text.bin --set train.eval_every=3 --set train.eval_bytes=500";
    let done = ws.ok(&format!("train {flags}"));
    assert_eq!(done.text(), "", "stdout is for machines");
    assert!(!done.stderr.contains('\x1b'), "plain lines in a pipe: {}", done.stderr);
    assert!(done.stderr.contains("run/ckpt.pt"), "{}", done.stderr);

    // Saved every 2 steps, at the best validation (the first is), and at the end; the last 3 are kept.
    assert_eq!(ws.numbered("run", "ckpt"), [3, 4, 6]);
    let names = ws.names("run");
    let events: Vec<_> = names.iter().filter(|name| name.starts_with("events.out.tfevents.")).collect();
    assert_eq!(events.len(), 1, "{names:?}");
    let mut expected = ["00000003", "00000004", "00000006", "best"].map(|n| format!("ckpt-{n}.pt")).to_vec();
    expected.extend(["ckpt.pt", "config.yaml", "metrics.jsonl"].map(String::from));
    expected.push(events[0].clone());
    expected.sort();
    assert_eq!(names, expected, "nothing else");
    let bytes = |name: &str| fs::read(ws.path("run").join(name)).expect(name);
    assert_eq!(bytes("ckpt.pt"), bytes("ckpt-00000006.pt"));
    let checkpoint = TrainingCheckpoint::open(&ws.path("run/ckpt.pt")).expect("opens");
    assert_eq!((checkpoint.progress().completed, checkpoint.model_config().d_model), (6, 32));

    let config = ws.read("run/config.yaml");
    let (mark, config) = config.split_once('\n').expect("a first line");
    assert!(mark.starts_with("# Written by bbt"), "{mark}");
    assert_eq!(ws.ok(&format!("config {flags}")).text(), config);
    assert_eq!(ws.ok("config --config run/config.yaml").text(), config);

    let rows = ws.rows("run/metrics.jsonl");
    let with = |key: &str| rows.iter().filter(|row| row.get(key).is_some()).collect::<Vec<_>>();
    let (val, train) = (with("val_loss"), with("loss"));
    assert_eq!(train.len(), 6);
    for (step, row) in (0..).zip(&train) {
        for key in KEYS {
            assert!(row[key].as_f64().is_some_and(f64::is_finite), "{key} in {row}");
        }
        let number = |key: &str| row[key].as_f64().expect(key);
        assert_eq!((row["step"].as_u64(), row["seq_len"].as_u64()), (Some(step), Some(16)));
        assert_eq!(row["bytes_seen"].as_u64(), Some((step + 1) * 2 * 16));
        assert!((number("bits_per_byte") - number("loss") / std::f64::consts::LN_2).abs() < 1e-9, "{row}");
    }
    assert_eq!(val.iter().map(|row| row["step"].as_u64()).collect::<Vec<_>>(), [Some(2), Some(5)]);
    for row in val {
        let bits = row["val_loss"].as_f64().expect("a loss") / std::f64::consts::LN_2;
        assert!((row["val_bits_per_byte"].as_f64().expect("bits") - bits).abs() < 1e-9, "{row}");
    }
    // The best checkpoint is the one with the lowest validation loss.
    let losses: Vec<f64> = rows.iter().filter_map(|row| row["val_loss"].as_f64()).collect();
    let best = if losses[1] < losses[0] { "ckpt-00000006.pt" } else { "ckpt-00000003.pt" };
    assert_eq!(bytes("ckpt-best.pt"), bytes(best));
}

#[test]
fn out_may_name_a_pt_file() {
    let ws = Workspace::new();
    ws.ok("train --config tiny.yaml --out models/a.pt");
    assert_eq!(ws.numbered("models", "a"), [2, 4, 6]);
    let names = ws.names("models");
    let numbered = ["a-00000002.pt", "a-00000004.pt", "a-00000006.pt"];
    assert_eq!(names, [&numbered[..], &["a.config.yaml", "a.metrics.jsonl", "a.pt", "a.tb"]].concat());
    assert_eq!(ws.names("models/a.tb").len(), 1);
    // Without a directory: the current one. The usual name stands for a directory of its own.
    ws.ok("train --config tiny.yaml --out b.pt");
    assert!(ws.path("b.pt").exists() && ws.path("b.metrics.jsonl").exists());
    ws.ok("train --config tiny.yaml --out run/ckpt.pt");
    assert!(ws.path("run/metrics.jsonl").exists() && ws.path("run/config.yaml").exists());
}

#[test]
fn keep_says_how_many_numbered_checkpoints_remain() {
    let ws = Workspace::new();
    ws.ok("train --config tiny.yaml --save_every 1 --set train.keep=2");
    assert_eq!(ws.numbered("run", "ckpt"), [5, 6]);
    // Every checkpoint that remains can be resumed from.
    for steps in [5, 6] {
        let path = ws.path(format!("run/ckpt-{steps:08}.pt"));
        assert_eq!(TrainingCheckpoint::open(&path).expect("opens").progress().completed, steps);
    }
}

#[test]
fn the_originals_command_lines_train_and_resume() {
    let ws = Workspace::new();
    let model = "--n_layer 2 --d_model 32 --n_head 2 --n_kv_head 1 --d_ff 64 --use_sdpa --no_ckpt --no_act_quant";
    let optim = "--lr 1e-3 --warmup_frac 0.1 --warmup_steps 2 --lr_schedule cosine --lr_min_factor 0.1 --wd 0.1 \
                 --grad_clip 1.0";
    let data = "--data text.bin --batch_size 2 --grad_accum 2 --seq_len 24 --seq_len_cap 16";
    let line = format!("train {data} {model} {optim} --out out.pt --log_every 1 --save_every 2");
    ws.ok(&format!("{line} --steps 4 --allow_overwrite"));
    let config = Config::from_yaml(&ws.read("out.config.yaml")).expect("reads back");
    assert_eq!((config.model.n_kv_head, config.optim.warmup_steps, config.data.seq_len), (Some(1), Some(2), Some(16)));
    assert_eq!((config.train.grad_accum, config.train.checkpointing), (2, false));

    // To the same file, as the original is resumed; the second time also allowed to overwrite it.
    ws.ok(&format!("{line} --steps 6 --resume out.pt"));
    assert_eq!(ws.losses("out.metrics.jsonl").into_keys().collect::<Vec<_>>(), (0..6).collect::<Vec<_>>());
    ws.ok(&format!("{line} --steps 8 --resume out.pt --no_opt_state --allow_overwrite"));
    assert_eq!(ws.losses("out.metrics.jsonl").into_keys().collect::<Vec<_>>(), (0..8).collect::<Vec<_>>());
    // argparse takes the flag without --resume, too.
    ws.ok(&format!("{line} --steps 2 --no_opt_state --allow_overwrite"));
}

#[test]
fn a_checkpoint_of_the_original_is_resumed() {
    let ws = Workspace::new();
    let done = ws.ok("train --resume golden.pt --data golden.bin --seq_len 16 --batch_size 2 --steps 22 --out next \
                      --log_every 1 --device cpu --set train.precision=fp32");
    assert!(done.stderr.contains("golden.pt at step 20 of 22"), "{}", done.stderr);
    let losses = ws.losses("next/metrics.jsonl");
    assert_eq!(losses.keys().copied().collect::<Vec<_>>(), [20, 21]);
    assert!(losses[&20] < 4.0, "trained already: {losses:?}");
    // Its shape was not given.
    let config = Config::from_yaml(&ws.read("next/config.yaml")).expect("reads back");
    assert_eq!((config.model.n_layer, config.model.d_model, config.model.d_ff), (2, 64, 160));
}

#[test]
fn resume_continues_the_same_run() {
    let ws = Workspace::new();
    // Whole; and in two parts, the second from each way to name the checkpoint. `auto` begins where there is none.
    ws.ok("train --config tiny.yaml --out whole --resume auto");
    let whole = ws.losses("whole/metrics.jsonl");
    assert_eq!(whole.len(), 6);
    for (out, resume) in [("a", "auto"), ("b", "b/ckpt.pt"), ("c", "c"), ("d", "./d/../d/ckpt.pt")] {
        ws.ok(&format!("train --config tiny.yaml --out {out} --set train.stop_at=3"));
        let done = ws.ok(&format!("train --config tiny.yaml --out {out} --resume {resume}"));
        assert!(done.stderr.contains("resuming from") && done.stderr.contains("step 3 of 6"), "{}", done.stderr);
        assert_eq!(ws.losses(&format!("{out}/metrics.jsonl")), whole, "--resume {resume}");
    }
    // To another directory: a run of its own from there on.
    ws.ok("train --config tiny.yaml --out e --resume whole/ckpt-00000004.pt");
    let rest: Vec<_> = whole.iter().filter(|(step, _)| **step >= 4).map(|(s, l)| (*s, *l)).collect();
    assert_eq!(ws.losses("e/metrics.jsonl").into_iter().collect::<Vec<_>>(), rest);

    // Fresh moments: the first loss is that of the same weights, what follows differs.
    ws.ok("train --config tiny.yaml --out f --set train.stop_at=3");
    ws.ok("train --config tiny.yaml --out f --resume auto --no_opt_state");
    let fresh = ws.losses("f/metrics.jsonl");
    assert_eq!(fresh[&3], whole[&3]);
    assert_ne!(fresh[&5], whole[&5]);
}

#[test]
fn a_finished_run_is_left_as_it_is() {
    let ws = Workspace::new();
    ws.ok("train --config tiny.yaml");
    let before = ws.snapshot();
    let done = ws.ok("train --config tiny.yaml --resume auto");
    assert!(done.stderr.contains("all 6 steps are done") && done.stderr.contains("--steps"), "{}", done.stderr);
    assert_eq!(ws.snapshot(), before);
    ws.ok("train --config tiny.yaml --resume auto --steps 7");
    assert_eq!(ws.losses("run/metrics.jsonl").len(), 7);
}

#[test]
fn init_takes_the_weights_and_starts_at_step_0() {
    let ws = Workspace::new();
    let flags = "--data golden.bin --seq_len 64 --batch_size 2 --steps 3 --log_every 1 --device cpu \
                 --set train.precision=fp32 --set data.order=sequential";
    ws.ok(&format!("train --init golden.pt --out a {flags}"));
    let losses = ws.losses("a/metrics.jsonl");
    assert_eq!(losses.keys().copied().collect::<Vec<_>>(), [0, 1, 2]);
    assert!(losses[&0] < 4.0, "an untrained model has about 6.7: {losses:?}");
    let config = Config::from_yaml(&ws.read("a/config.yaml")).expect("reads back");
    assert_eq!((config.model.n_layer, config.model.d_model, config.model.n_head), (2, 64, 4));
    // The weights alone, in the other format, do as well.
    ws.ok("convert golden.pt golden.safetensors");
    ws.ok(&format!("train --init golden.safetensors --out b {flags}"));
    assert_eq!(ws.losses("b/metrics.jsonl"), losses);
}

#[test]
fn a_cap_holds_for_the_whole_curriculum() {
    let ws = Workspace::new();
    let curriculum = "--set data.curriculum=[[0.0,8],[0.5,32]]";
    ws.ok(&format!("train --config tiny.yaml {curriculum} --seq_len_cap 16"));
    let rows = ws.rows("run/metrics.jsonl");
    let lengths: Vec<_> = rows.iter().filter_map(|row| row["seq_len"].as_u64()).collect();
    assert_eq!(lengths, [8, 8, 8, 16, 16, 16]);
    // --seq_len fixes it; with nothing given the cap applies to the original's curriculum.
    let config = |flags: &str| Config::from_yaml(&ws.ok(&format!("config {flags}")).text()).expect("reads back").data;
    assert_eq!(config(&format!("{curriculum} --seq_len 24")).curriculum(), [(0.0, 24)]);
    assert_eq!(config("--seq_len_cap 3000").curriculum(), [(0.0, 2048), (0.2, 3000), (0.5, 3000)]);
}

#[test]
fn stop_at_ends_a_run_as_an_interruption_would() {
    let ws = Workspace::new();
    ws.ok("train --config tiny.yaml --out whole");
    let done = ws.ok("train --config tiny.yaml --set train.stop_at=3");
    assert!(done.stderr.contains("stopped after step 3 of 6"), "{}", done.stderr);
    assert_eq!(ws.numbered("run", "ckpt"), [2, 3]);
    // What it says continues it does, to the end: stop_at was for that invocation.
    let resumed = Running::start(ws.shell(&resume_command(&done))).wait();
    assert_eq!(resumed.status, Some(0), "{}", resumed.stderr);
    assert_eq!(ws.losses("run/metrics.jsonl"), ws.losses("whole/metrics.jsonl"), "{}", resumed.stderr);
}

#[test]
fn a_signal_finishes_the_step_saves_and_says_how_to_resume() {
    for (signal, out) in [("INT", "a"), ("TERM", "it's a run/model.pt")] {
        let ws = Workspace::new();
        let args = ["train", "--config", "tiny.yaml", "--steps", "10000000", "--save_every", "0", "--out", out];
        let mut run = Running::start(ws.command(&args.map(OsStr::new)));
        run.until("has done some steps", |run| run.stderr().contains("step 5/"));
        run.signal(signal);
        let done = run.wait();
        assert_eq!(done.status, Some(0), "SIG{signal}: {}", done.stderr);
        let command = resume_command(&done);

        let checkpoint = if out.ends_with(".pt") { ws.path(out) } else { ws.path(out).join("ckpt.pt") };
        let steps = TrainingCheckpoint::open(&checkpoint).expect("opens").progress().completed;
        let log = if out.ends_with(".pt") { "model.metrics.jsonl" } else { "metrics.jsonl" };
        let log = checkpoint.parent().expect("a directory").join(log);
        let log = log.to_str().expect("UTF-8");
        assert_eq!(ws.losses(log).len() as u64, steps, "saved after the last step that was logged");

        let resumed = Running::start(ws.shell(&format!("{command} --set train.stop_at={}", steps + 2))).wait();
        assert_eq!(resumed.status, Some(0), "{command}: {}", resumed.stderr);
        assert!(resumed.stderr.contains(&format!("at step {steps} of")), "{}", resumed.stderr);
        assert_eq!(ws.losses(log).into_keys().collect::<Vec<_>>(), (0..steps + 2).collect::<Vec<_>>());
    }
}

#[test]
fn a_second_signal_exits_at_once() {
    // Several times: libtorch computes on other threads while the process ends.
    for signal in ["INT", "TERM", "INT", "TERM"] {
        let ws = Workspace::new();
        // One step that would take hours.
        let mut run = ws.start("train --config tiny.yaml --grad_accum 100000000");
        run.until("runs its first step", |_| ws.path("run/metrics.jsonl").exists());
        run.signal(signal);
        run.until("finishes the step", |run| run.stderr().contains("once more to exit at once"));
        run.signal(signal);
        let done = run.wait();
        assert_eq!(done.status, Some(130), "{}", done.stderr);
        assert_eq!(ws.numbered("run", "ckpt"), [0; 0]);
    }
}

#[test]
fn a_killed_run_leaves_a_checkpoint_that_loads_and_goes_on() {
    let ws = Workspace::new();
    let line = "train --config tiny.yaml --steps 1000000 --save_every 1 --resume auto \
                --set data.val=text.bin --set train.eval_every=5 --set train.eval_bytes=100";
    let newest = || ws.path("run").is_dir().then(|| ws.numbered("run", "ckpt")).and_then(|n| n.last().copied());
    let mut done = 0;
    for round in 0..6 {
        let mut run = ws.start(line);
        if round > 0 {
            run.until("goes on", |run| run.stderr().contains(&format!("at step {done} of")));
        }
        run.until("has saved", |_| newest() > Some(done));
        // Anywhere in the next few steps: a step with its checkpoint takes a few milliseconds.
        let delay = Duration::from_micros(rand::random_range(0..30_000));
        std::thread::sleep(delay);
        run.kill();

        let context = format!("round {round}, killed {delay:?} after step {done}: {:?}", ws.names("run"));
        let numbered = ws.numbered("run", "ckpt");
        done = *numbered.last().expect("a checkpoint");
        let named = numbered.iter().map(|steps| format!("ckpt-{steps:08}.pt"));
        for name in named.chain(["ckpt.pt".into(), "ckpt-best.pt".into()]) {
            let path = ws.path("run").join(&name);
            // Those two names come into being after the first numbered checkpoint.
            if name.contains("-0") || path.exists() {
                torch_file::read(&path).unwrap_or_else(|e| panic!("{e}: {context}"));
                TrainingCheckpoint::open(&path).unwrap_or_else(|e| panic!("{e}: {context}"));
            }
        }
        let path = ws.path(format!("run/ckpt-{done:08}.pt"));
        assert_eq!(TrainingCheckpoint::open(&path).expect("opens").progress().completed, done, "{context}");
    }
    // A run that ends in peace leaves nothing of the killed ones, and a log without gaps.
    ws.ok(&format!("{line} --set train.stop_at={}", done + 2));
    assert_eq!(ws.losses("run/metrics.jsonl").into_keys().collect::<Vec<_>>(), (0..done + 2).collect::<Vec<_>>());
    let left: Vec<_> = ws.names("run").into_iter().filter(|n| n.contains("tmp") || n.starts_with('.')).collect();
    assert_eq!(left, [""; 0]);
}

#[test]
fn a_terminal_gets_colour_and_a_bar() {
    if !can_run("`script` (util-linux, Debian's bsdutils)", shell_can("script --version")) {
        return;
    }
    let ws = Workspace::new();
    // `script` of util-linux runs a command in a pseudo-terminal.
    let typed = |command: &str| {
        let mut script = ws.shell(&format!("script --quiet --return --command '{command}' /dev/null"));
        script.env("TERM", "xterm-256color");
        Running::start(script).wait()
    };
    let done = typed("stty cols 120; bbt train --config tiny.yaml");
    let screen = done.text();
    assert_eq!(done.status, Some(0), "{screen}");
    for part in ["\x1b[", "━", "bits/byte", "lr ", "B/s", "eta"] {
        assert!(screen.contains(part), "{part:?} in {screen:?}");
    }
    let error = typed("bbt train --config none.yaml").text();
    assert!(error.contains("\x1b[1;31mbbt:\x1b[0m none.yaml"), "{error:?}");
    let error = typed("NO_COLOR=1 bbt train --config none.yaml").text();
    assert!(error.contains("bbt: none.yaml") && !error.contains('\x1b'), "{error:?}");
}

// --- config ---------------------------------------------------------------------------------------

#[test]
fn flags_override_yaml_and_yaml_overrides_defaults() {
    let ws = Workspace::new();
    let config = |flags: &str| Config::from_yaml(&ws.ok(&format!("config {flags}")).text()).expect("reads back");
    let mut expected = Config::default();
    expected.data.seq_len = Some(512);
    assert_eq!(config(""), expected);
    let yaml = config("--config tiny.yaml");
    assert_eq!((yaml.model.d_model, yaml.optim.lr, yaml.train.steps, yaml.optim.eps), (32, 0.003, 6, 1e-8));
    let both = config("--config tiny.yaml --steps 9 --set optim.lr=0.5 --set optim.betas=[0.8,0.99] --lr 0.25");
    assert_eq!((both.model.d_model, both.train.steps, both.optim.lr, both.optim.betas), (32, 9, 0.25, (0.8, 0.99)));
    // Repeated, the last counts; null takes a key back.
    let set = config("--set model.n_kv_head=2 --set train.stop_at=4 --set train.stop_at=5 --set model.n_kv_head=null");
    assert_eq!((set.model.n_kv_head, set.train.stop_at), (None, Some(5)));
    // The configurations that come with bbt are sound.
    for name in ["tiny", "small", "base", "original"] {
        let path = format!("{}/configs/{name}.yaml", env!("CARGO_MANIFEST_DIR"));
        let done = Running::start(ws.command(&["config", "--config", &path].map(OsStr::new))).wait();
        assert_eq!(done.status, Some(0), "{}", done.stderr);
    }
}

#[test]
fn every_flag_has_both_spellings() {
    let flags = [
        ("data", "a_b", "data", "train"),
        ("out", "runs/a_b", "train", "out"),
        ("steps", "7", "train", "steps"),
        ("log_every", "3", "train", "log_every"),
        ("save_every", "4", "train", "save_every"),
        ("n_layer", "5", "model", "n_layer"),
        ("d_model", "96", "model", "d_model"),
        ("n_head", "6", "model", "n_head"),
        ("n_kv_head", "2", "model", "n_kv_head"),
        ("d_ff", "100", "model", "d_ff"),
        ("lr", "0.002", "optim", "lr"),
        ("warmup_frac", "0.25", "optim", "warmup_frac"),
        ("warmup_steps", "11", "optim", "warmup_steps"),
        ("lr_schedule", "constant", "optim", "schedule"),
        ("lr_min_factor", "0.5", "optim", "min_lr_factor"),
        ("wd", "0.01", "optim", "weight_decay"),
        ("grad_clip", "0.75", "optim", "grad_clip"),
        ("batch_size", "3", "train", "batch_size"),
        ("grad_accum", "5", "train", "grad_accum"),
        ("seq_len", "33", "data", "seq_len"),
        ("device", "cpu", "train", "device"),
        ("seed", "99", "train", "seed"),
    ];
    let switches = [
        ("use_sdpa", "model", "attention", "sdpa"),
        ("no_ckpt", "train", "checkpointing", "false"),
        ("no_act_quant", "quant", "act", "none"),
    ];
    let ws = Workspace::new();
    for (hyphen, equals) in [("_", " "), ("-", " "), ("_", "="), ("-", "=")] {
        let mut line = String::from("config --set model.attention=math");
        for (name, value, _, _) in flags {
            line += &format!(" --{}{equals}{value}", name.replace('_', hyphen));
        }
        for (name, ..) in switches {
            line += &format!(" --{}", name.replace('_', hyphen));
        }
        let yaml: serde_yaml::Value = serde_yaml::from_str(&ws.ok(&line).text()).expect("YAML");
        for (name, value, section, key) in flags.into_iter().chain(switches.map(|(n, s, k, v)| (n, v, s, k))) {
            let expected: serde_yaml::Value = serde_yaml::from_str(value).expect("YAML");
            assert_eq!(yaml[section][key], expected, "--{name} in {line}");
        }
        assert_eq!(yaml["data"]["seed"], 99, "the seed is the data's, too");
    }
}

// --- eval -----------------------------------------------------------------------------------------

#[test]
fn eval_gives_the_golden_loss() {
    let ws = Workspace::new();
    let golden = Golden::open("bitbyte_tiny").meta["eval_identity"].clone();
    let done = ws.ok("eval --ckpt golden.pt --data golden.bin --seq_len 48 --device cpu --json");
    let found = done.json();
    let mut keys: Vec<_> = found.as_object().expect("an object").keys().cloned().collect();
    keys.sort();
    assert_eq!(keys, ["bits_per_byte", "bytes", "loss", "perplexity", "seq_len", "stride"]);
    let (loss, expected) = (found["loss"].as_f64().expect("loss"), golden["loss"].as_f64().expect("loss"));
    // Last bits turn roundings to int8, by which it changes by up to 2e-4.
    assert!((loss / expected - 1.0).abs() < 1e-3, "{loss} for {expected}");
    assert!((found["bits_per_byte"].as_f64().expect("bits") - loss / std::f64::consts::LN_2).abs() < 1e-12);
    assert_eq!((&found["bytes"], &found["seq_len"], &found["stride"]), (&golden["bytes"], &48.into(), &48.into()));

    // For people: still on stdout, being the result.
    let text = ws.ok("eval --ckpt golden.pt --data golden.bin --seq-len 48 --device cpu").text();
    assert!(text.contains("bits per byte") && text.contains("16799"), "{text}");
}

#[test]
fn eval_slides_a_window_and_keeps_shards_apart() {
    let ws = Workspace::new();
    let eval = |flags: &str| ws.ok(&format!("eval --ckpt golden.pt --device cpu --json {flags}")).json();
    let (plain, sliding) = (
        eval("--data golden.bin --seq_len 32 --max_bytes 3000"),
        eval("--data golden.bin --seq_len 32 --stride 8 --max_bytes 3000"),
    );
    assert_eq!((&sliding["bytes"], &sliding["stride"]), (&plain["bytes"], &8.into()));
    assert!(sliding["loss"].as_f64() < plain["loss"].as_f64(), "more context: {sliding} after {plain}");
    // Two shards: the first byte of each is not predicted, and the loss is the mean over bytes.
    let text = fs::read(ws.path("text.bin")).expect("reads");
    ws.write("shards/shard_00000.bin", &text[..1000]);
    ws.write("shards/shard_00001.bin", &text[1000..1500]);
    let both = eval("--data shards --seq_len 48");
    let (a, b) =
        (eval("--data shards/shard_00000.bin --seq_len 48"), eval("--data shards/shard_00001.bin --seq_len 48"));
    assert_eq!(both["bytes"], 999 + 499);
    let sum =
        |object: &serde_json::Value| object["loss"].as_f64().expect("loss") * object["bytes"].as_f64().expect("n");
    // Of 3,000 nats; one byte more or less is two.
    assert!((sum(&both) - sum(&a) - sum(&b)).abs() < 1.0, "{both} {a} {b}");
    // A run directory stands for its newest checkpoint; other precisions come near.
    ws.ok("train --config tiny.yaml");
    let run = ws.ok("eval --ckpt run --data text.bin --seq_len 16 --max_bytes 500 --device cpu --json").json();
    let file = ws.ok("eval --ckpt run/ckpt.pt --data text.bin --seq_len 16 --max_bytes 500 --device cpu --json").json();
    assert_eq!(run, file);
    let bf16 = eval("--data golden.bin --seq_len 32 --max_bytes 3000 --precision bf16");
    let ratio = bf16["loss"].as_f64().expect("loss") / plain["loss"].as_f64().expect("loss");
    assert!(ratio != 1.0 && (ratio - 1.0).abs() < 0.05, "{ratio}");
}

// --- generate -------------------------------------------------------------------------------------

#[test]
fn greedy_bytes_are_the_golden_ones() {
    let ws = Workspace::new();
    let golden = Golden::open("bitbyte_tiny").meta["greedy_identity"].clone();
    let prompt = golden["prompt"].as_str().expect("a prompt");
    let args = ["generate", "--ckpt", "golden.pt", "--prompt", prompt, "--temperature", "0"];
    let args = [&args[..], &["--max_new_tokens", "48", "--device", "cpu"]].concat();
    let os: Vec<&OsStr> = args.iter().map(OsStr::new).collect();
    let found = Running::start(ws.command(&[&os[..], &[OsStr::new("--json")]].concat())).wait().json();
    assert_eq!(found["bytes"], golden["bytes"]);
    assert!(found["bytes_per_second"].as_f64().is_some_and(|rate| rate > 0.0), "{found}");

    // Without --json: the same bytes, then a line break; what is for people goes to stderr.
    let done = Running::start(ws.command(&os)).wait();
    let bytes: Vec<u8> = serde_json::from_value(golden["bytes"].clone()).expect("bytes");
    assert_eq!(done.stdout, [&bytes[..], b"\n"].concat());
    assert!(done.stderr.contains("bytes per second") && !done.stderr.contains('\x1b'), "{}", done.stderr);
}

#[test]
fn prompts_of_any_bytes_and_seeds() {
    let ws = Workspace::new();
    let prompt = [0xff, 0x00, b'a', 0xc3, b'\n', 0x80];
    ws.write("prompt.bin", prompt);
    let bytes = |done: Done| -> Vec<u8> {
        assert_eq!(done.status, Some(0), "{}", done.stderr);
        serde_json::from_value(done.json()["bytes"].clone()).expect("bytes")
    };
    let flags = "generate --ckpt golden.pt --device cpu --max_new_tokens 40 --json";
    let from_file = bytes(ws.bbt(&format!("{flags} --prompt-file prompt.bin --seed 7")));
    assert_eq!((&from_file[..6], from_file.len()), (&prompt[..], 46));
    let stdin = fs::File::open(ws.path("prompt.bin")).expect("opens");
    let words = format!("{flags} --prompt_file - --seed 7");
    let mut command = ws.command(&words.split_whitespace().map(OsStr::new).collect::<Vec<_>>());
    command.stdin(stdin);
    assert_eq!(bytes(Running::start(command).wait()), from_file, "the same seed, the same bytes");
    assert_ne!(bytes(ws.bbt(&format!("{flags} --prompt-file prompt.bin --seed 8"))), from_file);

    // An argument holds any byte but NUL; one that begins with a hyphen is a prompt as well.
    for prompt in [&b"\xff\xfe-\x01"[..], b"--n_layer"] {
        let words: Vec<&OsStr> = flags.split_whitespace().map(OsStr::new).collect();
        let more = [OsStr::new("--prompt"), OsStr::from_bytes(prompt)];
        let all = bytes(Running::start(ws.command(&[&words[..], &more].concat())).wait());
        assert_eq!(&all[..prompt.len()], prompt);
    }
    // Among one byte there is no choice: greedy.
    let greedy = bytes(ws.bbt(&format!("{flags} --prompt The --temperature 0")));
    for choice in ["--top_k 1", "--top-p 1e-9"] {
        assert_eq!(bytes(ws.bbt(&format!("{flags} --prompt The --seed 3 {choice}"))), greedy, "{choice}");
    }
}

#[test]
fn bytes_are_streamed_as_they_come() {
    let ws = Workspace::new();
    let words = "generate --ckpt golden.pt --device cpu --prompt T --max_new_tokens 100000000";
    let mut command = ws.command(&words.split_whitespace().map(OsStr::new).collect::<Vec<_>>());
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("starts");
    let mut first = [0; 20];
    let mut stdout = child.stdout.take().expect("a pipe");
    std::io::Read::read_exact(&mut stdout, &mut first).expect("bytes before the end");
    assert_eq!(first[0], b'T');
    // A reader that has seen enough, as `head`, ends it without a complaint.
    drop(stdout);
    let output = child.wait_with_output().expect("ends");
    assert_eq!((output.status.code(), output.stderr), (Some(0), vec![]));
}

// --- pack, convert, inspect, plot -----------------------------------------------------------------

#[test]
fn packing_is_deterministic() {
    let ws = Workspace::new();
    for index in 0..40 {
        ws.write(&format!("docs/d{}/{index}.txt", index % 3), format!("document {index}\n").repeat(20 + index));
        ws.write(&format!("docs/d{}/{index}.png", index % 3), [0; 100]);
    }
    let pack = |out: &str| ws.ok(&format!("pack docs --out {out} --ext txt --shard_size 4K --val_frac 0.1"));
    let done = pack("a");
    assert_eq!(done.text(), "");
    assert!(done.stderr.contains("documents") && !done.stderr.contains('\x1b'), "{}", done.stderr);
    pack("b");
    let contents = |out: &str| -> Vec<_> {
        let all = ws.snapshot().into_iter();
        all.filter_map(|(path, bytes)| Some((path.strip_prefix(ws.path(out)).ok()?.to_path_buf(), bytes))).collect()
    };
    let a = contents("a");
    assert_eq!(a, contents("b"));
    // Every document is there, once.
    let bytes: Vec<u8> =
        a.iter().filter(|(p, _)| p.extension() == Some(OsStr::new("bin"))).flat_map(|(_, b)| b.clone()).collect();
    let text = String::from_utf8(bytes).expect("the text files alone");
    for index in 0..40 {
        assert_eq!(text.matches(&format!("document {index}\n")).count(), 20 + index, "document {index}");
    }
    assert!(ws.names("a/train").len() > 3 && !ws.names("a/val").is_empty());
    // And bbt trains on it.
    ws.ok("train --config tiny.yaml --data a/train --set data.val=a/val --set train.eval_every=3");
}

#[test]
fn convert_keeps_the_model() {
    let ws = Workspace::new();
    let loss = |ckpt: &str| {
        ws.ok(&format!("eval --ckpt {ckpt} --data text.bin --seq_len 48 --max_bytes 2000 --device cpu --json")).json()
    };
    let original = loss("golden.pt");
    let done = ws.ok("convert golden.pt a.safetensors");
    assert_eq!(done.text(), "");
    ws.ok("convert a.safetensors b.pt");
    ws.ok("convert golden.pt c.pt");
    for converted in ["a.safetensors", "b.pt", "c.pt"] {
        assert_eq!(loss(converted), original, "{converted}");
    }
    // From .pt to .pt nothing is lost: the run can be resumed.
    ws.ok("train --resume c.pt --data text.bin --seq_len 16 --batch_size 1 --steps 21 --out next");
    // Another dtype halves the file; back in fp32 it evaluates nearly as before.
    ws.ok("convert golden.pt half.safetensors --dtype bf16");
    let size = |name: &str| fs::metadata(ws.path(name)).expect(name).len();
    assert!(size("half.safetensors") < size("a.safetensors") * 6 / 10);
    ws.ok("convert half.safetensors back.pt --dtype fp32");
    let ratio = loss("back.pt")["loss"].as_f64().expect("loss") / original["loss"].as_f64().expect("loss");
    assert!(ratio != 1.0 && (ratio - 1.0).abs() < 0.02, "{ratio}");
}

#[test]
fn inspect_shows_what_is_in_a_checkpoint_and_a_shard_set() {
    let ws = Workspace::new();
    ws.ok("train --config tiny.yaml");
    ws.ok("convert run/ckpt.pt run.safetensors");
    for (file, parts) in [
        ("run/ckpt.pt", &["tok_emb.weight", "blocks.1.mlp.gate_up.weight", "256", "32", "128"][..]),
        ("golden.pt", &["tok_emb.weight", "norm_f.weight", "160", "64"]),
        ("run.safetensors", &["tok_emb.weight", "blocks.0.attn.q_proj.weight"]),
    ] {
        let text = ws.ok(&format!("inspect {file}")).text();
        for part in parts {
            assert!(text.contains(part), "{part} in {file}: {text}");
        }
        assert!(!text.contains('\x1b'), "{text}");
    }
    ws.ok("pack text.bin --out corpus --shard_size 8K --val_frac 0.1");
    let text = ws.ok("inspect corpus/train").text();
    assert!(text.contains("shard_00000.bin") && text.contains("shard_00001.bin"), "{text}");
}

#[test]
fn plot_draws_one_run_or_several() {
    let ws = Workspace::new();
    for out in ["a", "b"] {
        ws.ok(&format!("train --config tiny.yaml --out {out} --set data.val=text.bin --set train.eval_every=3"));
    }
    for (line, picture) in [("plot a --out one.png", "one.png"), ("plot a b/metrics.jsonl", "loss.png")] {
        let done = ws.ok(line);
        assert_eq!(done.text(), "");
        assert!(done.stderr.contains(picture), "{}", done.stderr);
        let bytes = fs::read(ws.path(picture)).expect(picture);
        assert!(bytes.starts_with(b"\x89PNG\r\n\x1a\n") && bytes.len() > 5000, "{} bytes", bytes.len());
    }
    assert_ne!(fs::read(ws.path("one.png")).expect("reads"), fs::read(ws.path("loss.png")).expect("reads"));
}

#[test]
fn plot_draws_a_schedule_before_any_training() {
    let ws = Workspace::new();
    let plot = |flags: &str| {
        let done = ws.ok(&format!("plot --schedule tiny.yaml {flags}"));
        assert_eq!((done.text().as_str(), done.stderr.as_str()), ("", "wrote schedule.png\n"));
        let bytes = fs::read(ws.path("schedule.png")).expect("schedule.png");
        assert!(bytes.starts_with(b"\x89PNG\r\n\x1a\n") && bytes.len() > 5000, "{} bytes", bytes.len());
        bytes
    };
    let six_steps = plot("");
    assert_eq!(six_steps, plot(""));
    assert_ne!(six_steps, plot("--steps 1000"));
    assert_ne!(plot("--steps 1000"), plot("--steps 1000 --set optim.schedule=wsd"));
    assert_ne!(plot("--steps 1000"), plot("--steps 1000 --set quant.start_frac=0.1"));
    ws.ok("plot --schedule tiny.yaml --out other.png");
    assert!(!ws.path("run").exists());
}

#[test]
fn a_look_inside_is_logged_and_drawn() {
    let ws = Workspace::new();
    ws.ok("train --config tiny.yaml --set train.internals_every=2 --set train.peak_tflops=0.1");
    let rows = ws.rows("run/metrics.jsonl");
    let looks: Vec<_> = rows.iter().filter(|row| row.get("layers").is_some()).collect();
    assert_eq!(looks.iter().map(|look| look["step"].as_u64()).collect::<Vec<_>>(), [Some(0), Some(2), Some(4)]);
    let names: Vec<_> = looks[0]["layers"].as_array().expect("a list").iter().map(|layer| &layer["name"]).collect();
    assert_eq!(
        (names.len(), names[0], names[2], names[17]),
        (18, &"tok_emb".into(), &"blocks.0.attn.q_proj".into(), &"norm_f".into())
    );
    assert!(rows[0]["mfu"].as_f64().is_some_and(|mfu| mfu > 0.0), "{}", rows[0]);
    for (line, picture) in
        [("plot run --internals", "internals.png"), ("plot run/metrics.jsonl --internals --out in.png", "in.png")]
    {
        let done = ws.ok(line);
        assert!(done.stderr.contains(picture), "{}", done.stderr);
        let bytes = fs::read(ws.path(picture)).expect(picture);
        assert!(bytes.starts_with(b"\x89PNG\r\n\x1a\n") && bytes.len() > 5000, "{} bytes", bytes.len());
    }
}

// --- the rest -------------------------------------------------------------------------------------

#[test]
fn completions_are_scripts_of_the_shell() {
    let ws = Workspace::new();
    for (shell, part) in [("bash", "complete -F _bbt"), ("zsh", "#compdef bbt"), ("fish", "complete -c bbt")] {
        let text = ws.ok(&format!("completions {shell}")).text();
        assert!(text.contains(part) && text.contains("grad-accum"), "{shell}");
    }
    let script = ws.ok("completions bash").stdout;
    ws.write("bbt.bash", script);
    let sourced = Running::start(ws.shell("source bbt.bash && complete -p bbt")).wait();
    assert_eq!(sourced.status, Some(0), "{}", sourced.stderr);
}

#[test]
fn doctor_says_what_there_is() {
    let text = Workspace::new().ok("doctor").text();
    for part in ["bbt", env!("CARGO_PKG_VERSION"), "libtorch   2.11.0", "threads", "GiB free", "cuda"] {
        assert!(text.contains(part), "{part} in {text}");
    }
    let with_kernels = |value: &str| {
        let mut doctor = Workspace::new().shell("bbt doctor");
        doctor.env("BBT_CPU_KERNELS", value);
        doctor.current_dir("/");
        Running::start(doctor).wait()
    };
    let kernels =
        "kernels    int8 products portable, rows portable, fp32 attention portable, bf16 attention portable, ";
    let text = with_kernels("portable").text();
    assert!(text.contains(kernels) && text.contains("adamw8bit portable"), "{text}");
    let refused = with_kernels("sse9").stderr;
    assert!(refused.contains("BBT_CPU_KERNELS=sse9: no such kernels or feature; use best, portable"), "{refused}");
    let mut blind = Workspace::new().shell("bbt doctor");
    // On a machine with a GPU, too.
    blind.env("CUDA_VISIBLE_DEVICES", "");
    blind.current_dir("/");
    let text = Running::start(blind).wait().text();
    assert!(text.contains("cuda       none: "), "says why: {text}");
}

// bitsandbytes' own CUDA library, which pip installs for the tests: that it can be opened, and has what is called.
#[test]
fn doctor_says_whose_kernel_steps_8_bit_moments_on_a_gpu() {
    let package = Path::new(env!("CARGO_MANIFEST_DIR")).join(".python-test/bitsandbytes");
    assert!(package.exists(), "no {}: `make test` installs it", package.display());
    let ws = Workspace::new();
    let doctor = |given: &Path| {
        let mut doctor = ws.shell("bbt doctor");
        doctor.env("BBT_BITSANDBYTES", given);
        let done = Running::start(doctor).wait();
        assert_eq!(done.status, Some(0), "{}", done.stderr);
        let line = done.text().lines().find(|line| line.starts_with("adamw8bit")).map(str::to_string);
        line.expect("a line")
    };
    let library = package.join("libbitsandbytes_cuda130.so").canonicalize().unwrap();
    let found = format!("adamw8bit  on a GPU by bitsandbytes' {}", library.display());
    assert_eq!(doctor(&package), found, "a folder: the library for libtorch's version of CUDA");
    assert_eq!(doctor(&library), found);
    assert_eq!(doctor(Path::new("none")), "adamw8bit  on a GPU by bbt's own kernel: BBT_BITSANDBYTES is none");
    let other = package.join("libbitsandbytes_cpu.so");
    let refused = doctor(&other);
    assert!(refused.contains("not on a GPU: BBT_BITSANDBYTES=") && refused.contains("it has no cadam"), "{refused}");
    // Beside libtorch, or why not.
    let unset = doctor(Path::new(""));
    let beside = Path::new(env!("BBT_TORCH_LIB")).join("../../bitsandbytes/libbitsandbytes_cuda130.so");
    match beside.canonicalize() {
        Ok(beside) => assert_eq!(unset, format!("adamw8bit  on a GPU by bitsandbytes' {}", beside.display())),
        Err(_) => assert!(unset.ends_with("(`make libtorch BITSANDBYTES=1` installs them)"), "{unset}"),
    }
}

#[test]
fn a_graph_is_for_a_gpu_and_its_absence_is_told() {
    let ws = Workspace::new();
    let with = ws.bbt("train --config tiny.yaml --device cpu --set train.cuda_graph=true --out with");
    assert_eq!(with.status, Some(0), "{}", with.stderr);
    assert!(with.stderr.contains("train.cuda_graph is for one GPU"), "{}", with.stderr);
    ws.ok("train --config tiny.yaml --device cpu --out without");
    assert_eq!(ws.losses("with/metrics.jsonl"), ws.losses("without/metrics.jsonl"));
}

#[test]
fn help_has_examples() {
    let ws = Workspace::new();
    let help = ws.ok("--help").text();
    let commands = [
        "train",
        "launch",
        "eval",
        "generate",
        "pack",
        "convert",
        "inspect",
        "plot",
        "config",
        "doctor",
        "completions",
    ];
    for command in commands {
        assert!(help.lines().any(|line| line.trim_start().starts_with(command)), "{command} in {help}");
        let text = ws.ok(&format!("{command} --help")).text();
        assert!(text.contains("Example") && text.contains(&format!("  bbt {command}")), "bbt {command} --help: {text}");
    }
    assert_eq!(ws.ok("--version").text(), format!("bbt {}\n", env!("CARGO_PKG_VERSION")));
    let bare = ws.bbt("");
    assert!(bare.status == Some(2) && bare.stderr.contains("Usage"), "{bare:?}");
}

#[test]
fn output_that_nobody_reads_is_no_failure() {
    let ws = Workspace::new();
    for command in ["config", "completions bash", "--help", "train --help", "doctor", "inspect golden.pt"] {
        let mut command = ws.command(&command.split_whitespace().map(OsStr::new).collect::<Vec<_>>());
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("starts");
        // Loading libtorch takes longer than this.
        drop(child.stdout.take());
        let output = child.wait_with_output().expect("ends");
        assert_eq!(
            (output.status.code(), String::from_utf8_lossy(&output.stderr).as_ref()),
            (Some(0), ""),
            "{command:?}"
        );
    }
}

//! What is the user's stays as it is: files, links, other runs. What is written is written in an order that survives.
//! The row numbers are those of the table of cases from the field that these tests are for.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;

use crate::common::cli::{Done, Running, Workspace};

/// A command of `bbt` with a library before it that tells of, or refuses, calls of the system (`common/shim.c`).
fn shimmed(ws: &Workspace, line: &str, variable: &str, value: &OsStr) -> Done {
    static SHIM: OnceLock<tempfile::TempDir> = OnceLock::new();
    let dir = SHIM.get_or_init(|| {
        let dir = tempfile::tempdir().expect("a directory");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/common/shim.c");
        let mut cc = Command::new("cc");
        cc.args(["-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-o"]).arg(dir.path().join("shim.so")).arg(source);
        assert!(cc.status().expect("a C compiler").success());
        dir
    });
    let mut command = ws.command(&line.split_whitespace().map(OsStr::new).collect::<Vec<_>>());
    command.env("LD_PRELOAD", dir.path().join("shim.so")).env(variable, value);
    Running::start(command).wait()
}

/// That `bbt` with these words fails with status 1, all of `words` in its message, and every file as it was.
fn refused(ws: &Workspace, line: &str, words: &[&str]) -> String {
    let before = ws.snapshot();
    let done = ws.bbt(line);
    assert_eq!(done.status, Some(1), "bbt {line}: {}", done.stderr);
    for word in words {
        assert!(done.stderr.contains(word), "{word:?} in the message of bbt {line}: {}", done.stderr);
    }
    // Not by assert_eq, which would print all their bytes.
    assert!(ws.snapshot() == before, "bbt {line} changed files: {:?}", ws.snapshot().keys());
    done.stderr
}

fn is_link(ws: &Workspace, name: &str) -> bool {
    ws.path(name).is_symlink()
}

/// Cuts the second half of a file off, as a power failure may.
fn cut(ws: &Workspace, name: &str) {
    let bytes = fs::read(ws.path(name)).expect(name);
    // A file of its own: its other names stay whole.
    fs::remove_file(ws.path(name)).expect(name);
    ws.write(name, &bytes[..bytes.len() / 2]);
}

/// Row 50.
#[test]
fn a_configuration_that_bbt_did_not_write_stays() {
    let ws = Workspace::new();
    let mine = format!("# my own\n{}", ws.read("tiny.yaml").replace("  out: run\n", ""));
    ws.write("config.yaml", &mine);
    let done = ws.ok("train --config config.yaml --out ckpt.pt --set train.stop_at=3");
    assert_eq!(ws.read("config.yaml"), mine);
    assert!(done.stderr.contains("config.yaml is not bbt's"), "{}", done.stderr);
    assert!(done.stderr.contains("--config ./ckpt.config.yaml"), "{}", done.stderr);
    // The run goes on by it, twice.
    ws.ok("train --config ckpt.config.yaml --out ckpt.pt --set train.stop_at=5 --resume auto");
    ws.ok("train --config ckpt.config.yaml --out ckpt.pt --set train.stop_at=null --resume auto");
    assert_eq!(ws.losses("metrics.jsonl").len(), 6);
    assert_eq!(ws.read("config.yaml"), mine);

    // One of bbt's that somebody has changed is theirs.
    ws.ok("train --config tiny.yaml --out run --set train.stop_at=2");
    let changed = ws.read("run/config.yaml").replace("steps: 6", "steps: 4 # for now");
    ws.write("run/config.yaml", &changed);
    ws.ok("train --config run/config.yaml --set train.stop_at=null --resume auto");
    assert_eq!((ws.read("run/config.yaml"), ws.losses("run/metrics.jsonl").len()), (changed, 4));

    // A link is somebody's, be it to nothing; and where both names are taken, nothing is done.
    ws.write("linked/.keep", "");
    symlink("../nothing.yaml", ws.path("linked/config.yaml")).expect("links");
    ws.ok("train --config tiny.yaml --out linked");
    assert!(is_link(&ws, "linked/config.yaml") && !ws.path("nothing.yaml").exists());
    for (out, name) in [("both", "both/ckpt.config.yaml"), ("models/a.pt", "models/a.config.yaml")] {
        ws.write("both/config.yaml", "mine");
        ws.write(name, "mine");
        refused(&ws, &format!("train --config tiny.yaml --out {out}"), &[name, "did not write", "--out"]);
    }
}

/// Rows 51 and 52.
#[test]
fn any_checkpoint_or_log_makes_a_run() {
    let ws = Workspace::new();
    ws.ok("train --config tiny.yaml --set data.val=text.bin --set train.eval_every=3 --set train.eval_bytes=200 \
           --set train.stop_at=3");
    let whole = ws.path("whole");
    fs::rename(ws.path("run"), &whole).expect("renames");
    let log = "metrics.jsonl";
    for kept in [["ckpt-best.pt"].as_slice(), &["ckpt.pt"], &["ckpt-00000003.pt"], &[log], &["ckpt-best.pt", log]] {
        let _ = fs::remove_dir_all(ws.path("run"));
        kept.iter().for_each(|name| ws.write(&format!("run/{name}"), fs::read(whole.join(name)).expect("reads")));
        refused(&ws, "train --config tiny.yaml", &["run holds a run already", kept[0], "--allow-overwrite"]);
    }
    // Best and log are left: the run goes on from the best, and says so.
    let done = ws.ok("train --config tiny.yaml --resume auto");
    assert!(done.stderr.contains("resuming from run/ckpt-best.pt at step 3 of 6 (the best"), "{}", done.stderr);
    assert_eq!(ws.losses("run/metrics.jsonl").len(), 6);
    // Replaced, nothing of it is left.
    ws.write("run/events.out.tfevents.1.theirs.1.0", "theirs");
    ws.write("run/ckpt-7.pt", "theirs");
    ws.ok("train --config tiny.yaml --allow-overwrite --set train.stop_at=1");
    let names = ws.names("run");
    let events = names.iter().filter(|name| name.starts_with("events.") && name.ends_with(".bbt")).count();
    assert_eq!((ws.numbered("run", "ckpt"), events), (vec![1, 7], 1), "{names:?}");
    assert_eq!(names.len(), 7, "theirs stay: {names:?}");
}

/// Row 53.
#[test]
fn links_and_devices_are_written_through_or_refused() {
    let ws = Workspace::new();
    ws.ok("train --config tiny.yaml --out done");
    // A checkpoint's name that is a link, to a file or to nothing.
    for target in ["elsewhere.pt", "nowhere.pt"] {
        ws.write("elsewhere.pt", "theirs");
        let _ = fs::remove_dir_all(ws.path("run"));
        ws.write("run/.keep", "");
        symlink(format!("../{target}"), ws.path("run/ckpt.pt")).expect("links");
        refused(&ws, "train --config tiny.yaml", &["run holds a run already", "ckpt.pt"]);
        refused(&ws, "train --config tiny.yaml --allow-overwrite", &["run/ckpt.pt is a symbolic link", "move it away"]);
        assert!(is_link(&ws, "run/ckpt.pt") && !ws.path("nowhere.pt").exists());
    }
    // Resumed from a numbered one, which is a link into an archive: that stays, the name in the run goes.
    fs::rename(ws.path("done/ckpt-00000004.pt"), ws.path("archived.pt")).expect("renames");
    symlink("../archived.pt", ws.path("done/ckpt-00000004.pt")).expect("links");
    let archived = fs::read(ws.path("archived.pt")).expect("reads");
    ws.ok("train --config tiny.yaml --out done --lr 1 --resume done/ckpt-00000002.pt");
    assert!(!is_link(&ws, "done/ckpt-00000004.pt"));
    assert_eq!(fs::read(ws.path("archived.pt")).expect("reads"), archived);
    // A log that is a link is written where it lies.
    ws.write("logged/.keep", "");
    symlink("../log", ws.path("logged/metrics.jsonl")).expect("links");
    refused(&ws, "train --config tiny.yaml --out logged", &["logged holds a run already"]);
    ws.ok("train --config tiny.yaml --out logged --allow-overwrite");
    assert!(is_link(&ws, "logged/metrics.jsonl"));
    assert_eq!(ws.losses("log").len(), 6);

    // bbt convert and bbt plot.
    for (line, out) in [("convert golden.pt out.safetensors", "out.safetensors"), ("convert golden.pt o.pt", "o.pt")] {
        symlink("target", ws.path(out)).expect("links");
        refused(&ws, line, &[out, "exists"]);
        for _ in 0..2 {
            ws.ok(&format!("{line} --allow-overwrite"));
            assert!(is_link(&ws, out) && fs::metadata(ws.path("target")).expect("a file").len() > 1000);
        }
        fs::remove_file(ws.path("target")).expect("removes");
    }
    symlink("drawn.png", ws.path("loss.png")).expect("links");
    ws.ok("plot done");
    assert!(is_link(&ws, "loss.png") && ws.path("drawn.png").exists());
    let fifo = ws.path("device.png");
    assert!(Command::new("mkfifo").arg(&fifo).status().expect("mkfifo").success());
    refused(&ws, "plot done --out device.png", &["device.png: cannot be written", "a named pipe"]);
    assert!(!fifo.is_file(), "it is there as it was");
}

/// Rows 57 and 58.
#[test]
fn two_runs_do_not_share_a_directory() {
    let ws = Workspace::new();
    let line = "train --config tiny.yaml --steps 1000000 --save_every 0 --set train.stop_at=1000000 --resume auto";
    let mut first = ws.start(line);
    first.until("trains", |run| run.stderr().contains("step 3/"));
    let pid = format!("process {} on ", first.pid());
    for line in [line, "train --config tiny.yaml --allow-overwrite", "train --config tiny.yaml --out run/ckpt.pt"] {
        let done = ws.bbt(line);
        assert_eq!(done.status, Some(1), "bbt {line}: {}", done.stderr);
        assert!(done.stderr.contains("run is in use") && done.stderr.contains(&pid), "{}", done.stderr);
    }
    // Another run in the same folder is no matter, nor is reading.
    ws.ok("train --config tiny.yaml --out run/other.pt");
    ws.ok("plot run --out p.png");
    // The lock dies with its process.
    first.kill();
    // It has left a log, but no checkpoint.
    let done = ws.bbt("train --config tiny.yaml --resume auto");
    assert_eq!(done.status, Some(1), "{}", done.stderr);
    assert!(done.stderr.contains("run holds metrics.jsonl of a run, but no checkpoint"), "{}", done.stderr);
    assert!(done.stderr.contains("add --allow-overwrite"), "{}", done.stderr);
    let done = ws.ok("train --config tiny.yaml --resume auto --allow-overwrite");
    assert!(done.stderr.contains("done: 6 steps"), "{}", done.stderr);
    let hidden: Vec<_> = ws.names("run").into_iter().filter(|name| name.starts_with('.')).collect();
    assert_eq!(hidden, [""; 0]);

    // A file system without locks does without.
    let done = shimmed(&ws, "train --config tiny.yaml --out unlocked", "SHIM_NO_FLOCK", OsStr::new("1"));
    assert_eq!(done.status, Some(0), "{}", done.stderr);
}

/// The original's layout.
#[test]
fn a_folder_holds_several_runs() {
    let ws = Workspace::new();
    let files = |stem: &str| -> Vec<_> {
        let all = ws.snapshot().into_iter();
        let name = |path: &Path| path.strip_prefix(ws.path("")).expect("in it").display().to_string();
        all.filter(|(path, _)| name(path).starts_with(&format!("models/{stem}"))).collect()
    };
    ws.ok("train --config tiny.yaml --out models/a.pt --set train.stop_at=3");
    let a = files("a");
    ws.ok("train --config tiny.yaml --out models/b.pt --lr 0.01");
    assert_eq!(files("a"), a, "a second run changes nothing of the first");
    let b = files("b");
    refused(&ws, "train --config tiny.yaml --out models/a.pt", &["models/a.pt holds a run already"]);
    // From one run's checkpoint into another run that is there: not unasked.
    refused(
        &ws,
        "train --config tiny.yaml --resume models/a.pt --out models/b.pt",
        &["models/b.pt holds a run already"],
    );
    ws.ok("train --config tiny.yaml --out models/a.pt --resume auto");
    assert_eq!(ws.losses("models/a.metrics.jsonl").len(), 6);
    ws.ok("train --config tiny.yaml --out models/a.pt --allow_overwrite --set train.stop_at=1");
    assert_eq!(files("b"), b, "replacing one run changes nothing of the other");
    assert_eq!((ws.numbered("models", "a"), ws.names("models/a.tb").len()), (vec![1], 1));
    ws.ok("train --config models/a.config.yaml --set train.stop_at=null --resume auto");

    ws.ok("plot models/a.pt models/b.metrics.jsonl");
    let message = refused(&ws, "eval --ckpt models --data text.bin --seq-len 16", &["models holds no checkpoint"]);
    assert!(message.contains("a.pt, b.pt: name one") && !message.contains("00000"), "{message}");
    // A date is not a number of steps, where the run has a configuration of its own.
    ws.ok("train --config tiny.yaml --out models/a-20261130.pt");
    let dated = files("a-20261130");
    ws.ok("train --config tiny.yaml --out models/a.pt --steps 7 --resume auto");
    ws.ok("train --config tiny.yaml --out models/a.pt --allow-overwrite");
    assert_eq!(files("a-20261130"), dated);
    refused(&ws, "train --config tiny.yaml --out models/a-best.pt", &["a-best.pt is the name of the best checkpoint"]);
}

/// Row 18.
#[test]
fn a_damaged_checkpoint_is_passed_over_for_the_newest_whole_one() {
    let ws = Workspace::new();
    ws.ok("train --config tiny.yaml --out whole");
    ws.ok("train --config tiny.yaml --set train.stop_at=4");
    // As it is after a power failure: the numbered one is cut off, its other name with it.
    cut(&ws, "run/ckpt-00000004.pt");
    fs::remove_file(ws.path("run/ckpt.pt")).expect("removes");
    fs::hard_link(ws.path("run/ckpt-00000004.pt"), ws.path("run/ckpt.pt")).expect("links");
    for line in ["eval --ckpt run --data text.bin --seq-len 16", "generate --ckpt run --prompt a", "inspect run"] {
        let stderr = ws.ok(line).stderr;
        assert!(stderr.contains("run/ckpt-00000004.pt: is damaged"), "{line}: {stderr}");
        assert!(stderr.contains("run/ckpt-00000002.pt is older, and whole"), "{line}: {stderr}");
    }
    let damaged = fs::read(ws.path("run/ckpt-00000004.pt")).expect("reads");
    let done = ws.ok("train --config tiny.yaml --resume auto");
    assert!(done.stderr.contains("resuming from run/ckpt-00000002.pt at step 2 of 6"), "{}", done.stderr);
    assert_eq!(ws.losses("run/metrics.jsonl"), ws.losses("whole/metrics.jsonl"));
    assert_eq!(fs::read(ws.path("run/ckpt-00000004.pt.damaged")).expect("set aside"), damaged);
    // Where none is whole, nothing is begun anew.
    let all = ["run/ckpt-00000002.pt", "run/ckpt-00000004.pt", "run/ckpt-00000006.pt", "run/ckpt.pt"];
    all.iter().for_each(|name| cut(&ws, name));
    refused(&ws, "train --config tiny.yaml --resume auto", &["run/ckpt-00000006.pt: is damaged"]);
    refused(&ws, "eval --ckpt run --data text.bin --seq-len 16", &["run/ckpt-00000006.pt: is damaged"]);
}

/// Row 35, on CIFS and some of FUSE.
#[test]
fn a_file_system_that_syncs_no_directory_does_without() {
    let ws = Workspace::new();
    for line in [
        "train --config tiny.yaml",
        "pack --out corpus --val-frac 0.1 text.bin",
        "convert golden.pt a.safetensors",
        "plot run",
    ] {
        let done = shimmed(&ws, line, "SHIM_NO_DIRECTORY_FSYNC", OsStr::new("1"));
        assert_eq!(done.status, Some(0), "bbt {line}: {}", done.stderr);
    }
    // And one that has no hard links.
    let done = shimmed(&ws, "train --config tiny.yaml --out copied", "SHIM_NO_LINK", OsStr::new("1"));
    assert_eq!(done.status, Some(0), "{}", done.stderr);
    assert_eq!(ws.losses("copied/metrics.jsonl").len(), 6);
}

/// What survives a power failure: each file is synced before it gets its name, and the name after that; `ckpt.pt` is
/// always there.
#[test]
fn files_are_synced_before_they_are_named() {
    let ws = Workspace::new();
    let log = ws.path("log");
    // Names without directories, process ids and what chance chooses.
    let calls = |line: &str| -> Vec<String> {
        let _ = fs::remove_file(&log);
        let done = shimmed(&ws, line, "SHIM_LOG", log.as_os_str());
        assert_eq!(done.status, Some(0), "bbt {line}: {}", done.stderr);
        let name = |path: &str| {
            let name = Path::new(path).file_name().map_or(String::new(), |name| name.to_string_lossy().into_owned());
            match name.strip_suffix(".tmp").and_then(|name| name.rsplit_once('.')) {
                Some((name, _pid)) => format!("{name}.tmp"),
                None => name,
            }
        };
        let text = fs::read_to_string(&log).expect("a log");
        text.lines().map(|line| line.split('\t').map(name).collect::<Vec<_>>().join(" ").trim_end().into()).collect()
    };
    let train = calls("train --config tiny.yaml --set train.keep=1");
    let saves: Vec<String> = [2, 4, 6]
        .into_iter()
        .flat_map(|steps: u64| {
            let mut calls = vec![
                format!("fsync .ckpt-{steps:08}.pt.tmp"),
                format!("rename .ckpt-{steps:08}.pt.tmp ckpt-{steps:08}.pt"),
                "fsync run".into(),
                "unlink ckpt.pt.link".into(),
                format!("link ckpt-{steps:08}.pt ckpt.pt.link"),
                "rename ckpt.pt.link ckpt.pt".into(),
                "fsync run".into(),
            ];
            calls.extend((steps > 2).then(|| format!("unlink ckpt-{:08}.pt", steps - 2)));
            calls
        })
        .collect();
    let first = train.iter().position(|call| *call == saves[0]).expect("a save");
    assert_eq!(train[first..first + saves.len()], saves, "{train:#?}");
    assert!(!train.contains(&"unlink ckpt.pt".into()), "{train:#?}");
    let config = ["fsync .config.yaml.tmp", "rename .config.yaml.tmp config.yaml", "fsync run"].map(String::from);
    assert_eq!(train[first - 3..first], config, "{train:#?}");

    let pack = calls("pack --out corpus --shard-size 8000 --val-frac 0.1 text.bin");
    let at = |call: &str| pack.iter().rposition(|made| made == call).unwrap_or_else(|| panic!("{call} in {pack:#?}"));
    let named = at("rename new corpus");
    for call in [
        "fsync shard_00000.bin",
        "fsync shard_00001.bin",
        "fsync manifest.json",
        "fsync train",
        "fsync val",
        "fsync new",
    ] {
        assert!(at(call) < named, "{call} in {pack:#?}");
    }
    assert!(pack[named + 1].starts_with("fsync "), "{pack:#?}");
    let convert = calls("convert golden.pt a.safetensors");
    assert_eq!(
        convert[..2],
        ["fsync .a.safetensors.tmp", "rename .a.safetensors.tmp a.safetensors"].map(String::from)[..]
    );
    assert!(convert[2].starts_with("fsync "), "{convert:#?}");
}

/// Row 38.
#[test]
fn data_cut_short_while_it_is_read_is_named() {
    let ws = Workspace::new();
    ws.write("data.bin", vec![7; 4_000_000]);
    let mut run = ws.start("train --config tiny.yaml --data data.bin --steps 1000000 --save_every 0");
    run.until("trains", |run| run.stderr().contains("step 3/"));
    fs::File::options().write(true).open(ws.path("data.bin")).expect("opens").set_len(0).expect("cuts");
    let done = run.wait();
    assert_eq!(done.status, Some(1), "{}", done.stderr);
    assert!(done.stderr.contains("bbt: data.bin: cannot be read any more: it was cut short"), "{}", done.stderr);
}

/// Row 32; no wait for somebody who writes to the pipe.
#[test]
fn what_is_no_file_is_named_at_once() {
    let ws = Workspace::new();
    ws.write("empty", "");
    ws.write("folder/file", "x");
    assert!(Command::new("mkfifo").arg(ws.path("pipe")).status().expect("mkfifo").success());
    for (name, words) in [
        ("pipe", "it is a named pipe (FIFO)"),
        ("empty", "empty"),
        ("folder", "no shard_*.bin"),
        ("/dev/zero", "a device"),
    ] {
        refused(&ws, &format!("train --config tiny.yaml --data {name}"), &["data.train", name, words]);
        let validation = format!("train --config tiny.yaml --set data.val={name} --set train.eval_every=1");
        refused(&ws, &validation, &["data.val", name, words]);
        refused(&ws, &format!("eval --ckpt golden.pt --data {name} --seq-len 8"), &["--data", name, words]);
        refused(&ws, &format!("inspect {name}"), &[name, words]);
    }
    refused(&ws, "eval --ckpt pipe --data text.bin --seq-len 8", &["pipe", "a named pipe"]);
}

/// Row 44, its first half.
#[test]
fn brackets_in_a_directory_that_is_there_are_no_glob() {
    let ws = Workspace::new();
    ws.write("pa [1] ü/train/x.bin", ws.read("text.bin"));
    let args = ["train", "--config", "tiny.yaml", "--data", "pa [1] ü/train/*.bin"];
    let done = Running::start(ws.command(&args.map(OsStr::new))).wait();
    assert_eq!(done.status, Some(0), "{}", done.stderr);
    refused(&ws, "train --config tiny.yaml --data x[1].bin", &["no file matches", "[[] stands for a bracket"]);
}

/// Row 64.
#[test]
fn a_limit_on_the_size_of_files_is_an_error_with_advice() {
    let ws = Workspace::new();
    // In kilobytes, bash's unit: room for the logs, not for a checkpoint; and for the first line of the log alone.
    for (limit, file) in [(60, "run/ckpt-00000002.pt"), (1, "run/")] {
        let done = Running::start(ws.shell(&format!("ulimit -f {limit}; exec bbt train --config tiny.yaml"))).wait();
        assert_eq!(done.status, Some(1), "{}", done.stderr);
        assert!(done.stderr.contains(file) && done.stderr.contains("ulimit -f"), "{}", done.stderr);
        assert!(!ws.path("run/ckpt.pt").exists());
        fs::remove_dir_all(ws.path("run")).expect("removes");
    }
}

/// Row 65.
#[test]
fn a_deleted_working_directory_is_named() {
    let ws = Workspace::new();
    for command in ["config", "doctor", "train --config /nowhere.yaml"] {
        let script = format!("mkdir gone && cd gone && rmdir ../gone && exec bbt {command}");
        let done = Running::start(ws.shell(&script)).wait();
        assert_eq!(done.status, Some(1), "{}", done.stderr);
        assert!(done.stderr.contains("bbt: the working directory has been deleted"), "{}", done.stderr);
        assert_eq!(done.stderr.lines().filter(|line| !line.contains("getcwd")).count(), 1, "{}", done.stderr);
    }
}

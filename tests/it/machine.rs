//! The machine around bbt: containers, terminals, streams, other PyTorches, names that are not UTF-8.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::common::cli::{Done, Running, Workspace};

// --- containers -----------------------------------------------------------------------------------

/// A control group of this machine with a limit, for a process to be put in. Removed when dropped.
struct Group(PathBuf);

impl Drop for Group {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

/// A group below this process's own, with `files` written; where the machine does not let us, why.
fn group(controller: &str, version_1: &[(&str, &str)], version_2: &[(&str, &str)]) -> Result<Group, String> {
    let own = fs::read_to_string("/proc/self/cgroup").map_err(|error| error.to_string())?;
    let path_of = |wanted: &str| {
        own.lines().find_map(|line| {
            let mut fields = line.splitn(3, ':').skip(1);
            let (controllers, path) = (fields.next()?, fields.next()?);
            controllers.split(',').any(|name| name == wanted).then(|| path.trim_start_matches('/').to_string())
        })
    };
    let name = format!("bbt-test-{}-{controller}", std::process::id());
    let (dir, files) = match path_of(controller) {
        Some(path) => (Path::new("/sys/fs/cgroup").join(controller).join(path), version_1),
        None => (Path::new("/sys/fs/cgroup").join(path_of("").ok_or("no control groups")?), version_2),
    };
    let group = Group(dir.join(name));
    let say = |error: std::io::Error| format!("{}: {error}", group.0.display());
    fs::create_dir(&group.0).map_err(say)?;
    for (file, text) in files {
        fs::write(group.0.join(file), text).map_err(say)?;
    }
    Ok(group)
}

/// Runs `bbt` with these words within `group`.
fn within(ws: &Workspace, group: &Group, line: &str) -> Done {
    let mut command = ws.shell(&format!("echo $$ > '{}/cgroup.procs' && exec bbt {line}", group.0.display()));
    command.env_remove("OMP_NUM_THREADS");
    Running::start(command).wait()
}

#[test]
fn the_memory_that_a_container_may_use_is_what_counts() {
    let limit = (2u64 << 30).to_string();
    let limits = ([("memory.limit_in_bytes", limit.as_str())], [("memory.max", limit.as_str())]);
    let group = match group("memory", &limits.0, &limits.1) {
        Ok(group) => group,
        Err(why) => return eprintln!("not run: this machine lets us make no group with a memory limit: {why}"),
    };
    let ws = Workspace::new();
    let text = within(&ws, &group, "doctor").text();
    let line = text.lines().find(|line| line.starts_with("memory")).expect("a line");
    assert!(line.contains("free of the 2.0 GiB that the container may use"), "{text}");
    // 680 million parameters take more than 10 GiB.
    let done = within(&ws, &group, "train --config tiny.yaml --n_layer 24 --d_model 1536 --n_head 12 --d_ff 4096");
    assert_eq!(done.status, Some(1), "{}", done.stderr);
    assert!(done.stderr.contains("training this model needs about") && done.stderr.contains("are free"), "{done:?}");
    let done = within(&ws, &group, "train --config tiny.yaml --steps 1");
    assert_eq!(done.status, Some(0), "what fits is trained: {}", done.stderr);
}

#[test]
fn the_cpu_that_a_container_may_use_sets_the_number_of_threads() {
    let limits = ([("cpu.cfs_period_us", "100000"), ("cpu.cfs_quota_us", "100000")], [("cpu.max", "100000 100000")]);
    let group = match group("cpu", &limits.0, &limits.1) {
        Ok(group) => group,
        Err(why) => return eprintln!("not run: this machine lets us make no group with a CPU limit: {why}"),
    };
    let ws = Workspace::new();
    let text = within(&ws, &group, "doctor").text();
    assert!(text.contains("threads    1 for computing; the container may use 1.0 CPUs"), "{text}");
}

// --- another PyTorch ------------------------------------------------------------------------------

#[test]
fn a_libtorch_on_the_library_path_does_not_replace_the_one_that_bbt_was_built_with() {
    let ws = Workspace::new();
    for name in ["libtorch.so", "libtorch_cpu.so", "libc10.so"] {
        ws.write(&format!("other/{name}"), "x");
    }
    let mut command = ws.command(&["config"].map(OsStr::new));
    command.env("LD_LIBRARY_PATH", ws.path("other"));
    let done = Running::start(command).wait();
    assert_eq!(done.status, Some(0), "{}", done.stderr);
    let dynamic = Command::new("readelf").args(["-d", env!("CARGO_BIN_EXE_bbt")]).output().expect("readelf (binutils)");
    let dynamic = String::from_utf8_lossy(&dynamic.stdout).into_owned();
    assert!(dynamic.contains("(RPATH)") && !dynamic.contains("(RUNPATH)"), "{dynamic}");
}

// --- terminals ------------------------------------------------------------------------------------

#[test]
fn a_dumb_terminal_gets_plain_lines() {
    let ws = Workspace::new();
    let line =
        "bbt train --config tiny.yaml --set data.val=text.bin --set train.eval_every=3 --set train.eval_bytes=200";
    for (term, out) in [(Some("dumb"), "a"), (None, "b"), (Some(""), "c")] {
        let mut script = ws.shell(&format!("script --quiet --return --command '{line} --out {out}' /dev/null"));
        match term {
            Some(term) => script.env("TERM", term),
            None => script.env_remove("TERM"),
        };
        let done = Running::start(script).wait();
        let screen = done.text();
        assert_eq!(done.status, Some(0), "{term:?}: {screen}");
        for part in ["step 1/6  ", "step 6/6  ", "step 3  validation", "done: 6 steps"] {
            assert!(screen.contains(part), "{term:?}: {part:?} in {screen:?}");
        }
        assert!(!screen.contains('\x1b'), "{term:?}: {screen:?}");
    }
    let mut script = ws.shell("script --quiet --return --command 'bbt train --config none.yaml' /dev/null");
    script.env("TERM", "dumb");
    let screen = Running::start(script).wait().text();
    assert!(screen.contains("bbt: none.yaml") && !screen.contains('\x1b'), "{screen:?}");
}

#[test]
fn help_that_cannot_be_written_is_a_failure() {
    let ws = Workspace::new();
    for words in ["help", "--help", "train --help", "--version"] {
        let done = Running::start(ws.shell(&format!("exec bbt {words} > /dev/full"))).wait();
        assert_eq!(done.status, Some(1), "{words}: {done:?}");
        assert!(done.stderr.starts_with("bbt: standard output: No space left"), "{words}: {}", done.stderr);
        let whole = ws.ok(words);
        assert!(!whole.stdout.is_empty() && whole.stderr.is_empty(), "{words}: {whole:?}");
    }
}

// --- files, links and streams ---------------------------------------------------------------------

#[test]
fn streams_are_packed_and_evaluated() {
    let ws = Workspace::new();
    ws.write("a.txt", "A".repeat(100_000));
    ws.write("b.txt", "B");
    let shell = |line: &str| {
        let done = Running::start(ws.shell(line)).wait();
        assert_eq!(done.status, Some(0), "{line}: {}", done.stderr);
        done
    };
    let both = format!("{}\0B", "A".repeat(100_000));
    shell("bbt pack --out sub <(cat a.txt) <(sleep 0.3; cat b.txt)");
    assert_eq!(ws.read("sub/train/shard_00000.bin"), both);
    shell("cat a.txt | bbt pack --out dash - b.txt");
    assert_eq!(ws.read("dash/train/shard_00000.bin"), both);
    shell("cat a.txt | bbt pack --out stdin --ext txt /dev/stdin b.txt");
    assert_eq!(ws.read("stdin/train/shard_00000.bin"), both);
    shell("bbt pack --out file - < a.txt");
    assert_eq!(ws.read("file/train/shard_00000.bin").len(), 100_000);
    assert_eq!(ws.names("sub"), ["manifest.json", "train"]);
    // Its end is held out as a file's would be.
    let done = shell("cat a.txt | bbt pack --out held --val-frac 0.1 -");
    assert!(done.stderr.contains("the end of - was held out"), "{}", done.stderr);
    assert_eq!(ws.read("held/val/shard_00000.bin").len(), 10_000);
    let done = Running::start(ws.shell("bbt pack --out nothing - < /dev/null")).wait();
    assert!(done.status == Some(1) && done.stderr.contains("-: no file with data"), "{done:?}");
    assert!(!ws.path("nothing").exists());

    let eval = |data: &str| format!("bbt eval --ckpt golden.pt --seq_len 48 --device cpu --json --data {data}");
    let file = shell(&eval("text.bin")).json();
    assert_eq!(shell(&format!("cat text.bin | {}", eval("-"))).json(), file);
    assert_eq!(shell(&format!("cat text.bin | {}", eval("/dev/stdin"))).json(), file);
    assert_eq!(shell(&eval("<(cat text.bin)")).json(), file);
    let done = Running::start(ws.shell(&format!("true | {}", eval("-")))).wait();
    assert!(done.status == Some(1) && done.stderr.contains("--data -: nothing came"), "{done:?}");
}

#[test]
fn an_interrupted_wait_for_a_stream_leaves_nothing() {
    let ws = Workspace::new();
    // Its other end stays open and says nothing.
    let mut command = ws.command(&["pack", "--out", "corpus", "-"].map(OsStr::new));
    command.stdin(Stdio::piped());
    let mut running = Running::start(command);
    running.until("has its directory", |_| ws.names(".").iter().any(|name| name.starts_with(".corpus.")));
    running.signal("INT");
    let done = running.wait();
    assert_eq!(done.status, Some(1), "{}", done.stderr);
    assert!(done.stderr.contains("nothing was written"), "{}", done.stderr);
    assert!(!ws.names(".").iter().any(|name| name.contains("corpus")), "{:?}", ws.names("."));
}

#[test]
fn links_that_lead_nowhere_and_compressed_files_are_named_and_packing_goes_on() {
    let ws = Workspace::new();
    ws.write("in/a.txt", "A");
    ws.write("in/b.txt.gz", [0x1f, 0x8b, 8, 0, 1, 2]);
    symlink("nowhere", ws.path("in/dangling.txt")).expect("links");
    symlink("loop.txt", ws.path("in/loop.txt")).expect("links");
    let done = ws.ok("pack in --out corpus");
    for part in
        ["in/dangling.txt: a link that leads nowhere", "in/loop.txt: a link", "in/b.txt.gz: packed as it is", "(gzip)"]
    {
        assert!(done.stderr.contains(part), "{part} in {}", done.stderr);
    }
    assert!(done.stderr.contains("corpus/train: 2 documents"), "{}", done.stderr);
    assert!(!ws.read("corpus/manifest.json").contains("warning"));
}

#[test]
fn an_empty_directory_is_filled_as_a_mount_point_must_be() {
    let ws = Workspace::new();
    fs::create_dir(ws.path("packed")).expect("creates");
    ws.ok("pack text.bin --out packed --val_frac 0.1");
    assert_eq!(ws.names("packed"), ["manifest.json", "train", "val"]);
    // A file system of its own there: it can be written to, and not renamed.
    fs::create_dir(ws.path("volume")).expect("creates");
    let script = "set -e; mount -t tmpfs none volume; bbt pack text.bin --out volume; \
                  bbt pack tiny.yaml --out volume --allow-overwrite; ls -A volume; cat volume/train/*";
    let namespaces = format!("unshare --user --map-root-user --mount bash -c '{script}'");
    let done = Running::start(ws.shell(&namespaces)).wait();
    if done.stderr.contains("unshare: ") {
        return eprintln!("not run: this machine lets us make no namespace: {}", done.stderr);
    }
    assert_eq!(done.status, Some(0), "{}", done.stderr);
    assert_eq!(done.text(), format!("manifest.json\ntrain\n{}", ws.read("tiny.yaml")));
}

#[test]
fn names_that_are_not_utf_8_are_taken_or_named() {
    let ws = Workspace::new();
    let name = |name: &[u8]| OsStr::from_bytes(name).to_os_string();
    let (caf, out) = (name(b"caf\xe9.txt"), name(b"out\xff"));
    fs::copy(ws.path("text.bin"), ws.path(&caf)).expect("copies");
    fs::copy(ws.path("golden.pt"), ws.path(name(b"m\xff.pt"))).expect("copies");
    let run = |words: &[&OsStr]| Running::start(ws.command(words)).wait();
    let os = OsStr::new;
    let done = run(&[os("pack"), &caf, os("--out"), &out]);
    assert_eq!(done.status, Some(0), "{}", done.stderr);
    let done = run(&[
        os("generate"),
        os("--ckpt"),
        &name(b"m\xff.pt"),
        os("--prompt"),
        os("a"),
        os("--max-new-tokens"),
        os("1"),
    ]);
    assert_eq!(done.status, Some(0), "{}", done.stderr);
    for (words, flag, shown) in [
        ([os("train"), os("--data"), &*caf], "--data ", "caf\\xE9.txt"),
        ([os("config"), os("--out"), &*out], "--out ", "out\\xFF"),
        ([os("config"), os("--val_data"), &*out], "--val-data ", "out\\xFF"),
    ] {
        let done = run(&words);
        assert_eq!(done.status, Some(2), "{}", done.stderr);
        assert!(done.stderr.contains(flag) && done.stderr.contains(shown), "{}", done.stderr);
        assert!(done.stderr.contains("rename it"), "says what to do: {}", done.stderr);
    }
}

#[test]
fn a_log_of_another_program_is_not_to_be_edited() {
    let ws = Workspace::new();
    let log = "Using torch AdamW\nstep      0  seq 2048  loss 5.7\n";
    ws.write("log.txt", log);
    let done = ws.bbt("plot log.txt");
    assert_eq!(done.status, Some(1));
    assert!(done.stderr.contains("log.txt:1: not a row") && done.stderr.contains("metrics.jsonl"), "{}", done.stderr);
    assert!(!done.stderr.contains("delete"), "{}", done.stderr);
    assert_eq!(ws.read("log.txt"), log);
}

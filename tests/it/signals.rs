//! Signals that a run takes, and those that it must not; what is said where nobody can hear it.

use std::fs;

use crate::common::cli::{Done, Running, Workspace};
use bbt::checkpoint::TrainingCheckpoint;

const ENDLESS: &str = "train --config tiny.yaml --steps 10000000 --save_every 0";

/// The last step that a run has said.
fn said(run: &Running) -> u64 {
    let stderr = run.stderr();
    let steps = stderr.lines().filter_map(|line| line.split("step ").nth(1)?.split('/').next()?.parse().ok());
    steps.max().unwrap_or(0)
}

fn goes_on(run: &mut Running) {
    let before = said(run);
    run.until("goes on", |run| said(run) > before + 3);
}

/// Whether process `pid` ignores signal `number`.
fn ignores(pid: u32, number: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("a process");
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).expect("a mask");
    u64::from_str_radix(mask.trim(), 16).expect("a mask") >> (number - 1) & 1 == 1
}

/// Row 46: nohup, and shells' background jobs.
#[test]
fn a_signal_that_is_ignored_stays_ignored() {
    let ws = Workspace::new();
    for (signal, number) in [("HUP", 1), ("INT", 2), ("USR1", 10)] {
        let out = signal.to_lowercase();
        let mut run = Running::start(ws.shell(&format!("trap '' {signal}; exec bbt {ENDLESS} --out {out}")));
        run.until("trains", |run| said(run) > 2);
        assert!(ignores(run.pid(), number), "SIG{signal}");
        run.signal(signal);
        goes_on(&mut run);
        assert!(!run.stderr().contains("saved") && !run.stderr().contains("finishing"), "{}", run.stderr());
        run.signal("TERM");
        let done = run.wait();
        assert_eq!(done.status, Some(0), "{}", done.stderr);
        assert!(done.stderr.contains("stopped after step"), "{}", done.stderr);
    }
    // A job in the background of a script has SIGINT ignored.
    let script = format!("bbt {ENDLESS} & wait");
    let mut shell = Running::start(ws.shell(&script));
    shell.until("trains", |run| said(run) > 2);
    let pid = fs::read_to_string(format!("/proc/{0}/task/{0}/children", shell.pid())).expect("a child");
    let pid = pid.split_whitespace().next().and_then(|pid| pid.parse().ok()).expect("a process id");
    assert!(ignores(pid, 2));
    let kill = |name: &str| assert!(ws.shell(&format!("kill -{name} {pid}")).status().expect("kill").success());
    kill("INT");
    goes_on(&mut shell);
    kill("TERM");
    assert_eq!(shell.wait().status, Some(0));

    let sparse = fs::File::create(ws.path("large")).expect("creates");
    sparse.set_len(300 << 20).expect("a size");
    let mut pack = Running::start(ws.shell("trap '' HUP INT; exec bbt pack --out corpus large"));
    pack.until("packs", |_| ws.names(".").iter().any(|name| name.starts_with(".corpus.")));
    let pid = pack.pid();
    for (name, number) in [("HUP", 1), ("INT", 2)] {
        assert!(ignores(pid, number), "SIG{name}");
        pack.signal(name);
    }
    let done = pack.wait();
    assert_eq!(done.status, Some(0), "{}", done.stderr);
    assert_eq!(fs::metadata(ws.path("corpus/manifest.json")).map(|found| found.is_file()).ok(), Some(true));
}

/// Row 48: a cluster's warning.
#[test]
fn usr1_saves_and_goes_on_or_ends() {
    let ws = Workspace::new();
    let completed = |path: &str| TrainingCheckpoint::open(&ws.path(path)).expect("opens").progress().completed;
    let mut run = ws.start(ENDLESS);
    for signal in ["USR1", "USR2"] {
        run.until("trains", |run| said(run) > 2);
        let (before, saved) = (said(&run), run.stderr().matches("saved, as asked, run/ckpt.pt").count());
        run.signal(signal);
        run.until("saves", |run| run.stderr().matches("saved, as asked, run/ckpt.pt").count() > saved);
        assert!(completed("run/ckpt.pt") >= before);
        goes_on(&mut run);
    }
    run.signal("TERM");
    assert_eq!(run.wait().status, Some(0));
    assert_eq!(ws.numbered("run", "ckpt").len(), 3, "two that were asked for, and the last");

    let mut run = ws.start(&format!("{ENDLESS} --set train.on_usr1=stop --out stopped"));
    run.until("trains", |run| said(run) > 2);
    run.signal("USR1");
    let done = run.wait();
    assert_eq!(done.status, Some(0), "{}", done.stderr);
    assert!(done.stderr.contains("stopped after step") && done.stderr.contains("to go on"), "{}", done.stderr);
    assert!(completed("stopped/ckpt.pt") > 2);
}

/// The same under `bbt launch`, which passes it on; every rank saves after the same step.
#[test]
fn usr1_saves_on_all_ranks_as_one() {
    let ws = Workspace::new();
    for (mode, zero) in [("save", 0), ("save", 1), ("stop", 0)] {
        let out = format!("{mode}{zero}");
        let flags = format!("--set train.on_usr1={mode} --set ddp.zero_stage={zero} --out {out}");
        let mut run = ws.start(&format!("launch --nproc-per-node 2 -- {ENDLESS} {flags} --ddp"));
        run.until("trains", |run| said(run) > 2);
        run.signal("USR1");
        if mode == "save" {
            run.until("saves", |run| run.stderr().contains("saved, as asked"));
            goes_on(&mut run);
            run.signal("TERM");
        }
        let done = run.wait();
        assert_eq!(done.status, Some(0), "{}", done.stderr);
        assert!(done.stderr.contains("stopped after step"), "{}", done.stderr);
        let numbered = ws.numbered(&out, "ckpt");
        // Ranks may get the signal in two steps, and then save in both.
        assert!((1..=if mode == "save" { 3 } else { 1 }).contains(&numbered.len()), "{numbered:?}");
        let path = ws.path(format!("{out}/ckpt.pt"));
        let steps = TrainingCheckpoint::open(&path).expect("opens").progress().completed;
        assert_eq!(Some(&steps), numbered.last());
    }
}

/// Row 54.
#[test]
fn stderr_that_cannot_be_written_changes_nothing() {
    let ws = Workspace::new();
    ws.ok("train --config tiny.yaml --set train.stop_at=3");
    let silent = |line: &str| -> Done {
        let done = Running::start(ws.shell(&format!("exec bbt {line} 2> /dev/full"))).wait();
        assert_eq!(done.stderr, "");
        done
    };
    for line in [
        "train --config tiny.yaml --resume auto",
        "train --config tiny.yaml --resume auto",
        "train --config tiny.yaml --out stopped --set train.stop_at=2",
        "train --config tiny.yaml --out board.pt --set data.val=text.bin --set train.eval_every=2",
        "pack --out corpus --val-frac 0.1 text.bin",
        "convert golden.pt a.safetensors",
        "plot run",
        "eval --ckpt run --data text.bin --seq-len 16",
        "generate --ckpt run --prompt a --max-new-tokens 3",
        "doctor",
        "launch --nproc-per-node 2 -- train --config tiny.yaml --out ranks --ddp",
    ] {
        assert_eq!(silent(line).status, Some(0), "bbt {line}");
    }
    assert_eq!((ws.losses("run/metrics.jsonl").len(), ws.losses("ranks/metrics.jsonl").len()), (6, 6));
    for (line, status) in
        [("train --config none.yaml", 2), ("eval --ckpt none --data text.bin --seq-len 8", 1), ("x", 2)]
    {
        assert_eq!(silent(line).status, Some(status), "bbt {line}");
    }
    // With tracing, and with a signal.
    let script = format!("BBT_LOG=trace exec bbt {ENDLESS} --out traced 2> /dev/full");
    let mut run = Running::start(ws.shell(&script));
    let log = || fs::read_to_string(ws.path("traced/metrics.jsonl")).unwrap_or_default();
    run.until("trains", |_| log().lines().count() > 3);
    run.signal("TERM");
    assert_eq!(run.wait().status, Some(0));
    assert!(ws.path("traced/ckpt.pt").exists());
}

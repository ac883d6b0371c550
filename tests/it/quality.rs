//! `make quality` in small: a table of two ways of training, which a second call takes from what it has kept.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

const VARIANTS: &str = "full precision, lr 1e-3; the original's rule, from the start";

fn quality(work: &Path, document: &Path, only: &str) -> Output {
    command(work, document, only, "8").output().expect("python3")
}

fn command(work: &Path, document: &Path, only: &str, steps: &str) -> Command {
    let driver = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/quality.py");
    let bbt = env!("CARGO_BIN_EXE_bbt");
    let mut command = crate::common::python_command(&[driver.as_ref(), bbt.as_ref(), document.as_ref()]);
    command.env("WORK", work).env("ONLY", only).env("CORPORA", "code").env("SEEDS", "1").env("STEPS", steps);
    command
}

#[test]
fn a_table_comes_of_it_and_what_is_trained_is_kept() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let document = dir.path().join("page.md");
    let around = ["Before.\n<!-- written by make quality -->\n", "<!-- end -->\nAfter.\n"];
    fs::write(&document, around.join("an older page\n")).expect("writes");
    let output = quality(dir.path(), &document, VARIANTS);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let page = String::from_utf8(output.stdout).expect("UTF-8");
    assert_eq!(fs::read_to_string(&document).expect("reads"), around.join(&page));
    let bits = |name: &str| -> f64 {
        let row = page.lines().find(|line| line.starts_with(&format!("| {name} |"))).expect("a row");
        row.split('|').nth(2).and_then(|cell| cell.trim().parse().ok()).expect("a number")
    };
    let found: Vec<f64> = VARIANTS.split("; ").map(bits).collect();
    let (full, original) = (found[0], found[1]);
    // 8 bits is knowing nothing; after eight steps both know a little, and not the same.
    assert!(full < 7.9 && original < 8.5 && full != original, "{page}");

    // Weights are not kept, so nothing but the results can tell it.
    let again = quality(dir.path(), &document, VARIANTS);
    assert_eq!(String::from_utf8(again.stdout).expect("UTF-8"), page);

    let unknown = quality(dir.path(), &document, "full");
    assert!(String::from_utf8_lossy(&unknown.stderr).contains("'full' is none of"), "{unknown:?}");
}

#[test]
fn what_was_interrupted_is_not_kept_and_what_is_refused_ends_it() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let document = dir.path().join("page.md");
    let mut long = command(dir.path(), &document, "ternary", "2000");
    let mut running = long.stderr(Stdio::piped()).spawn().expect("python3");
    let started = Instant::now();
    let found = || fs::read_dir(dir.path()).expect("reads").map(|entry| entry.expect("an entry").path());
    let has_rows = |run: PathBuf| fs::metadata(run.join("metrics.jsonl")).is_ok_and(|rows| rows.len() > 0);
    while !found().any(has_rows) {
        assert!(started.elapsed() < Duration::from_secs(120), "it never trains");
        assert!(running.try_wait().expect("a process").is_none(), "it ended by itself");
        std::thread::sleep(Duration::from_millis(50));
    }
    // What trains gets the signal, as it does from a terminal; it saves and exits with 0.
    let kill = format!("kill -INT $(cat /proc/{}/task/*/children)", running.id());
    assert!(Command::new("bash").args(["-c", &kill]).status().expect("bash").success());
    let output = running.wait_with_output().expect("ends");
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && words.contains("interrupted before its last step"), "{words}");
    assert_eq!(found().filter(|path| path.extension().is_some_and(|ext| ext == "json")).count(), 0, "{words}");

    let refused = command(dir.path(), &document, "ternary", "0").output().expect("python3");
    assert!(!refused.status.success());
    assert!(String::from_utf8_lossy(&refused.stderr).contains("train.steps"), "{refused:?}");
}

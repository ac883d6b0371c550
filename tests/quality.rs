//! `make quality` in small: a table of two ways of training, which a second call takes from what it has kept.

mod common;

use std::fs;
use std::path::Path;
use std::process::Output;

fn quality(work: &Path, document: &Path, only: &str) -> Output {
    let driver = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/quality.py");
    let bbt = env!("CARGO_BIN_EXE_bbt");
    let mut command = common::python_command(&[driver.as_ref(), bbt.as_ref(), document.as_ref()]);
    command.env("WORK", work).env("ONLY", only).env("CORPORA", "code").env("SEEDS", "1").env("STEPS", "8");
    command.output().expect("python3")
}

#[test]
fn a_table_comes_of_it_and_what_is_trained_is_kept() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let document = dir.path().join("page.md");
    let around = ["Before.\n<!-- written by make quality -->\n", "<!-- end -->\nAfter.\n"];
    fs::write(&document, around.join("an older page\n")).expect("writes");
    let output = quality(dir.path(), &document, "full precision; the original's rule");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let page = String::from_utf8(output.stdout).expect("UTF-8");
    assert_eq!(fs::read_to_string(&document).expect("reads"), around.join(&page));
    let bits = |name: &str| -> f64 {
        let row = page.lines().find(|line| line.starts_with(&format!("| {name} |"))).expect("a row");
        row.split('|').nth(2).and_then(|cell| cell.trim().parse().ok()).expect("a number")
    };
    let [full, original] = ["full precision", "the original's rule"].map(bits);
    // 8 bits is knowing nothing; after eight steps both know a little, and not the same.
    assert!(full < 7.9 && original < 8.5 && full != original, "{page}");

    // Weights are not kept, so nothing but the results can tell it.
    let again = quality(dir.path(), &document, "full precision; the original's rule");
    assert_eq!(String::from_utf8(again.stdout).expect("UTF-8"), page);

    let unknown = quality(dir.path(), &document, "full");
    assert!(String::from_utf8_lossy(&unknown.stderr).contains("'full' is none of"), "{unknown:?}");
}

//! `make bench` in small: bbt and PyTorch train a model of one layer side by side, and a table comes of it.
//!
//! The contender is this program itself, started again with a configuration: so it is never an older build.

#[path = "it/common/mod.rs"]
mod common;
#[path = "../benches/step.rs"]
mod step;

use std::fs;
use std::path::Path;
use std::process::Output;

/// Runs benches/compare.py on a document that has a place for its page.
fn compare(document: &Path, sizes: &str) -> Output {
    let driver = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/compare.py");
    let this = std::env::current_exe().expect("this program");
    let mut command = common::python_command(&[driver.as_ref(), this.as_ref(), document.as_ref()]);
    command.env("OMP_NUM_THREADS", "1").env("QUICK", "1").env("SIZES", sizes).env("ONLY", "bbt fp32,eager fp32");
    command.env_remove("DEVICE");
    command.output().expect("python3")
}

/// The cells of the row that begins with `name`.
fn row<'a>(page: &'a str, name: &str) -> Vec<&'a str> {
    let row = page.lines().find(|line| line.starts_with(&format!("| {name} |")));
    row.unwrap_or_else(|| panic!("no row for {name}: {page}")).split('|').map(str::trim).collect()
}

fn both_train_the_same_and_a_table_comes_of_it() {
    let document = tempfile::NamedTempFile::new().expect("a temporary file");
    let around = ["Before.\n<!-- cpu: written by make bench -->\n", "<!-- cpu: end -->\nAfter.\n"];
    fs::write(&document, around.join("an older page\n")).expect("writes");
    let output = compare(document.path(), "1x64x2x96@2x64");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));

    let page = String::from_utf8(output.stdout).expect("UTF-8");
    assert_eq!(fs::read_to_string(&document).expect("reads"), around.join(&page));
    let [ours, theirs] = ["bbt fp32", "eager fp32"].map(|name| {
        let row = row(&page, name);
        let [ms, loss] = [row[2], row[row.len() - 2]].map(|cell| cell.parse::<f64>().expect("a number"));
        assert!(ms > 0.0, "{name}: {ms} ms");
        loss
    });
    // ln 256 = 5.545 is where a model that has learned nothing stands.
    // From other weights each, so they need not agree further than the driver asks.
    assert!(ours < 5.2 && theirs < 5.2, "{ours} and {theirs}");
}

fn a_contender_that_fails_is_said_and_is_an_error() {
    let document = tempfile::NamedTempFile::new().expect("a temporary file");
    fs::write(&document, "<!-- cpu: written by make bench -->\n<!-- cpu: end -->\n").expect("writes");
    let output = compare(document.path(), "1x64x3x96@2x64");
    assert_eq!(output.status.code(), Some(1));
    let page = fs::read_to_string(&document).expect("reads");
    assert!(row(&page, "bbt fp32")[2].contains("3 heads do not divide"), "{page}");
    assert!(row(&page, "eager fp32")[2].starts_with("failed: RuntimeError"), "{page}");
}

/// The driver fails where contenders end with other losses than each other by more than a twentieth.
fn contenders_that_train_different_things_are_an_error() {
    const CODE: &str = r#"
import sys
from types import SimpleNamespace
sys.path.insert(0, sys.argv[1])
from compare import disagreement

def contenders(*losses):
    return [SimpleNamespace(name=f"c{i}", size="1x64", failure=None, losses=[loss]) for i, loss in enumerate(losses)]

print(len(disagreement(contenders(5.0, 5.2))), *disagreement(contenders(5.0, 5.3)), *disagreement(contenders(5.0, float("nan"))))
"#;
    let benches = concat!(env!("CARGO_MANIFEST_DIR"), "/benches");
    let said = common::python(&["-c".as_ref(), CODE.as_ref(), benches.as_ref()]);
    assert!(said.starts_with("0 1x64: losses differ") && said.matches("losses differ").count() == 2, "{said}");
}

const TESTS: [(&str, fn()); 3] = [
    ("both_train_the_same_and_a_table_comes_of_it", both_train_the_same_and_a_table_comes_of_it),
    ("a_contender_that_fails_is_said_and_is_an_error", a_contender_that_fails_is_said_and_is_an_error),
    ("contenders_that_train_different_things_are_an_error", contenders_that_train_different_things_are_an_error),
];

/// Runs as libtest does: `--list` lists, names filter, `--exact` whole names. Its other flags change nothing here.
fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if args.first().is_some_and(|arg| arg.starts_with('{')) {
        return step::main();
    }
    let has = |flag: &str| args.iter().any(|arg| arg == flag);
    let (filters, exact) = (args.iter().filter(|arg| !arg.starts_with('-')).collect::<Vec<_>>(), has("--exact"));
    let is_chosen = |name: &str| filters.iter().any(|f| if exact { name == *f } else { name.contains(f.as_str()) });
    // None of them is marked as ignored.
    for (name, test) in TESTS.iter().filter(|(name, _)| !has("--ignored") && (filters.is_empty() || is_chosen(name))) {
        if has("--list") {
            println!("{name}: test");
        } else {
            test();
            println!("test {name} ... ok");
        }
    }
    Ok(())
}

//! What the command line says: the help of every command, and the message and exit status of common mistakes.
//!
//! `INSTA_UPDATE=always cargo test --test it snapshots` writes tests/it/snapshots/ anew, for a review with `git diff`.

use insta::assert_snapshot;

use crate::common::cli::Workspace;

const COMMANDS: [&str; 11] =
    ["train", "launch", "eval", "generate", "pack", "convert", "inspect", "plot", "config", "doctor", "completions"];

#[test]
fn the_help_of_every_command() {
    let ws = Workspace::new();
    assert_snapshot!("help", ws.ok("--help").text());
    for command in COMMANDS {
        assert_snapshot!(format!("help_{command}"), ws.ok(&format!("{command} --help")).text());
    }
}

#[test]
fn the_messages_of_common_mistakes() {
    let ws = Workspace::new();
    ws.write("unknown_key.yaml", "model:\n  n_layer: 2\n  n_layr: 3\n");
    ws.write("type.yaml", "optim:\n  lr: fast\n");
    ws.write("range.yaml", "model: {n_layer: 2}\ntrain: {steps: 0}\n");
    ws.write("both.yaml", "data: {seq_len: 8, curriculum: [[0.0, 8]]}\n");
    ws.write("section.yaml", "modle: {}\n");
    ws.write("list.yaml", "- 1\n");
    ws.write("damaged.pt", "no checkpoint");
    ws.write("short.bin", "abc");
    ws.write("folder/notes.txt", "text");
    let mut text = String::new();
    for line in [
        "train --config missing.yaml",
        "train --config unknown_key.yaml",
        "train --config type.yaml",
        "train --config range.yaml",
        "train --config both.yaml",
        "train --config section.yaml",
        "train --config list.yaml",
        "train --no-such-flag",
        "train --steps many",
        "train --config tiny.yaml --set optim.lrr=1",
        "train --config tiny.yaml --set optim.lr=fast",
        "train --config tiny.yaml --set optim=1",
        "train --config tiny.yaml --lr=-1",
        "train --config tiny.yaml --n-head 5",
        "train --config tiny.yaml --data missing",
        "train --config tiny.yaml --data folder",
        "train --config tiny.yaml --data short.bin",
        "train --config tiny.yaml --val-every 2",
        "train --config tiny.yaml --resume missing.pt",
        "train --config tiny.yaml --device tpu",
        "train --config tiny.yaml --ddp",
        "eval --ckpt missing.pt --data text.bin --seq-len 16",
        "eval --ckpt damaged.pt --data text.bin --seq-len 16",
        "eval --ckpt folder --data text.bin --seq-len 16",
        "inspect damaged.pt",
        "convert golden.pt golden.gguf",
        "plot folder --out folder.svg",
        "pack --out packed nowhere",
        "pack --out folder text.bin",
        "nothing",
    ] {
        let done = ws.bbt(line);
        let status = done.status.expect("no signal");
        assert_ne!(status, 0, "bbt {line}");
        text.push_str(&format!("$ bbt {line}\n{}[status {status}]\n\n", done.stderr));
    }
    assert_snapshot!("errors", text);
}

//! Exact resume: N steps, or k steps, a new process's worth of state, and N - k steps, are the same run.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use crate::common::{assert_same_checkpoint, text};
use bbt::checkpoint::{TrainingCheckpoint, Value, torch_file};
use bbt::config::{Config, ModelConfig, Order, Precision};
use bbt::training::metrics::{self, Row, TrainObserver, TrainRow};
use bbt::training::{Start, TrainError, Trainer};

fn config(precision: Precision, order: Order, out: &Path) -> Config {
    let mut config = Config {
        model: ModelConfig { n_layer: 2, d_model: 32, n_head: 2, d_ff: 64, ..ModelConfig::default() },
        ..Config::default()
    };
    config.data.train = text().to_str().expect("a UTF-8 path").into();
    config.data.val = Some(config.data.train.clone());
    config.data.order = order;
    // The window changes at step 5, within what the resumed run does or has behind it.
    config.data.curriculum = Some(vec![(0.0, 16), (0.5, 24)]);
    config.train.steps = 10;
    config.train.batch_size = 2;
    config.train.grad_accum = 3;
    config.train.precision = precision;
    config.train.log_every = 1;
    config.train.eval_every = 4;
    config.train.eval_bytes = Some(500);
    config.train.save_every = 3;
    config.train.out = out.into();
    config
}

fn train(config: Config, start: Start) -> bool {
    let mut trainer = Trainer::new(config, start).expect("a trainer");
    trainer.train(&mut (), &AtomicBool::new(false)).expect("trains").finished
}

/// The log without what depends on the clock and the machine.
fn log(dir: &Path) -> Vec<Row> {
    let rows = metrics::read(&dir.join("metrics.jsonl")).expect("a log");
    let timeless = |row| match row {
        Row::Train(row) => Row::Train(TrainRow { bytes_per_second: 0.0, data_wait: 0.0, peak_memory_bytes: 0, ..row }),
        val => val,
    };
    rows.into_iter().map(timeless).collect()
}

#[test]
fn a_resumed_run_is_bit_identical() {
    for (precision, order) in [
        (Precision::Fp32, Order::Shuffled),
        (Precision::Fp32, Order::Random),
        (Precision::Bf16, Order::Sequential),
        (Precision::Fp16, Order::Shuffled),
    ] {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let whole = dir.path().join("whole");
        assert!(train(config(precision, order, &whole), Start::Fresh));
        for stop in [3, 5, 7] {
            let parts = dir.path().join(format!("parts{stop}"));
            let mut first = config(precision, order, &parts);
            first.train.stop_at = Some(stop);
            assert!(!train(first, Start::Fresh));
            let resume = Start::Resume { path: parts.join("ckpt.pt"), optimizer_state: true };
            assert!(train(config(precision, order, &parts), resume));
            let read = |dir: &Path| torch_file::read(&dir.join("ckpt.pt")).expect("reads");
            assert_same_checkpoint(&read(&whole), &read(&parts), "");
            assert_eq!(log(&whole), log(&parts), "{precision:?} {order:?} {stop}");
        }
    }
}

/// The checkpoint `from` with another loss scale, as `to`.
fn with_scale(from: &Path, to: &Path, scale: f64) {
    let mut checkpoint = torch_file::read(from).expect("reads");
    let Value::Dict(entries) = &mut checkpoint else { panic!("a checkpoint is a dict") };
    let scaler = entries.iter_mut().find(|(key, _)| key.as_str() == Some("scaler")).expect("a scaler");
    let Value::Dict(state) = &mut scaler.1 else { panic!("its state is a dict") };
    state.iter_mut().find(|(key, _)| key.as_str() == Some("scale")).expect("a scale").1 = Value::Float(scale);
    torch_file::write(to, &checkpoint).expect("writes");
}

#[test]
fn skipped_steps_are_counted_on_over_a_resumption() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let config = |out: &str, stop_at: Option<u64>| {
        let mut config = config(Precision::Fp16, Order::Shuffled, &dir.path().join(out));
        config.train.stop_at = stop_at;
        config
    };
    let resume = |path: PathBuf| Start::Resume { path, optimizer_state: true };
    let checkpoint = |out: &str| dir.path().join(out).join("ckpt.pt");
    // From a scale at which the gradients of every step overflow.
    train(config("begun", Some(1)), Start::Fresh);
    let overflowing = dir.path().join("overflowing.pt");
    with_scale(&checkpoint("begun"), &overflowing, f64::exp2(100.0));
    train(config("whole", Some(7)), resume(overflowing.clone()));
    train(config("parts", Some(4)), resume(overflowing.clone()));
    train(config("parts", Some(7)), resume(checkpoint("parts")));
    let read = |out: &str| torch_file::read(&checkpoint(out)).expect("reads");
    assert_same_checkpoint(&read("whole"), &read("parts"), "");
    // As text: a norm that is not a number equals nothing.
    let text = |out: &str| format!("{:?}", log(&dir.path().join(out)));
    assert_eq!(text("whole"), text("parts"));
    let progress = |out: &str| TrainingCheckpoint::open(&checkpoint(out)).expect("opens").progress();
    assert_eq!((progress("parts").skipped, progress("parts").skipped_in_a_row), (6, 6));

    // The run gives up after as many in a row, in whichever part they were.
    let mut impatient = config("parts", None);
    impatient.train.max_nonfinite = 8;
    let mut trainer = Trainer::new(impatient, resume(checkpoint("parts"))).expect("a trainer");
    let error = trainer.train(&mut (), &AtomicBool::new(false)).expect_err("diverges");
    assert!(matches!(error, TrainError::Diverged { skipped: 8, step: 8, .. }), "{error}");
}

#[test]
fn the_best_checkpoint_stays_the_best_when_a_resumed_run_gets_worse() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let mut first = config(Precision::Fp32, Order::Shuffled, dir.path());
    (first.train.eval_every, first.train.stop_at) = (1, Some(5));
    let mut worse = first.clone();
    train(first, Start::Fresh);
    let read = |name: &str| std::fs::read(dir.path().join(name)).expect(name);
    let best = read("ckpt-best.pt");
    // Steps so large that the model forgets what it knew.
    (worse.optim.lr, worse.train.stop_at) = (1e3, None);
    train(worse, Start::Resume { path: dir.path().join("ckpt.pt"), optimizer_state: true });
    let losses: Vec<f64> = log(dir.path())
        .iter()
        .filter_map(|row| if let Row::Val(row) = row { Some(row.val_loss) } else { None })
        .collect();
    assert_eq!(losses.len(), 10);
    let lowest = losses[..5].iter().copied().fold(f64::INFINITY, f64::min);
    assert!(losses[5..].iter().all(|loss| *loss > lowest), "{losses:?}");
    assert!(read("ckpt-best.pt") == best, "it is as it was");
    assert_eq!(
        TrainingCheckpoint::open(&dir.path().join("ckpt.pt")).expect("opens").progress().best_val_loss,
        Some(lowest)
    );
}

#[test]
fn what_a_killed_run_logged_past_its_checkpoint_is_logged_once() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let mut first = config(Precision::Fp32, Order::Shuffled, dir.path());
    first.train.stop_at = Some(7);
    train(first, Start::Fresh);
    // As if killed after step 7 with the checkpoint of step 6 the newest.
    std::fs::remove_file(dir.path().join("ckpt-00000007.pt")).expect("removes");
    let resume = Start::Resume { path: dir.path().join("ckpt-00000006.pt"), optimizer_state: true };
    train(config(Precision::Fp32, Order::Shuffled, dir.path()), resume);
    let steps: Vec<u64> = log(dir.path()).iter().filter(|row| matches!(row, Row::Train(_))).map(Row::step).collect();
    assert_eq!(steps, (0..10).collect::<Vec<_>>());
}

#[test]
fn an_interrupt_finishes_the_step_and_saves() {
    struct Stop<'a>(&'a AtomicBool);
    impl TrainObserver for Stop<'_> {
        fn on_step(&mut self, row: &TrainRow) {
            if row.step == 2 {
                self.0.store(true, std::sync::atomic::Ordering::SeqCst);
            }
        }
    }
    let dir = tempfile::tempdir().expect("a temporary directory");
    let interrupt = AtomicBool::new(false);
    let mut trainer = Trainer::new(config(Precision::Fp32, Order::Shuffled, dir.path()), Start::Fresh).expect("new");
    let summary = trainer.train(&mut Stop(&interrupt), &interrupt).expect("trains");
    assert_eq!((summary.completed, summary.finished), (3, false));
    assert!(dir.path().join("ckpt-00000003.pt").exists());
}

/// Layers of 2^25 multiplications and more, for which `quant.kernel: auto` once timed two implementations in every
/// process: a busy machine could then make another run of it, and a resumed one go on with the other kernel.
#[test]
fn in_processes_of_their_own_with_a_busy_machine_beside_them() {
    use crate::common::cli::Workspace;
    use std::sync::atomic::Ordering;

    let ws = Workspace::new();
    let train = |out: &str, more: &str| {
        let line = format!(
            "train --config tiny.yaml --n_layer 1 --d_model 128 --d_ff 512 --seq_len 128 --batch_size 2 --steps 4 \
             --set train.checkpointing=true --out {out} {more}"
        );
        ws.ok(&line);
    };
    train("whole", "");
    let busy = AtomicBool::new(true);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while busy.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            });
        }
        train("again", "");
        train("parts", "--set train.stop_at=2");
        train("parts", "--resume auto");
        busy.store(false, Ordering::Relaxed);
    });
    let read = |run: &str| torch_file::read(&ws.path(run).join("ckpt.pt")).expect("reads");
    for other in ["again", "parts"] {
        assert_same_checkpoint(&read("whole"), &read(other), "");
    }
}

//! What a person sees of a run as it goes, on stderr: a bar in a terminal, plain lines in a pipe or a dumb terminal.
//!
//! Colours only in a terminal, and none where [`NO_COLOR`](https://no-color.org) is set.

use std::io::{self, Write};
use std::time::{Duration, Instant};

use crate::training::metrics::{TrainObserver, TrainRow, ValRow};
use indicatif::{DecimalBytes, FormattedDuration, ProgressBar, ProgressDrawTarget, ProgressStyle};

/// How often a pipe is told of bytes done.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// Where progress goes.
enum Display {
    Bar(ProgressBar),
    Lines(Box<dyn Write>),
}

impl Display {
    /// For stderr, as it is now.
    fn stderr(total: u64) -> Self {
        if !super::stderr_is_capable() {
            return Self::Lines(Box::new(io::stderr()));
        }
        let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
        // The bar takes the columns that the text leaves.
        if let Ok(style) = ProgressStyle::with_template("{wide_bar:.cyan/dim} {msg}") {
            bar.set_style(style.progress_chars("━╸─"));
        }
        Self::Bar(bar)
    }

    /// What is done now, in numbers and in words.
    fn show(&mut self, done: u64, text: String) {
        match self {
            Self::Bar(bar) => {
                bar.set_position(done);
                bar.set_message(text);
            }
            Self::Lines(_) => self.line(&text),
        }
    }

    /// A line that stays.
    fn line(&mut self, text: &str) {
        match self {
            Self::Bar(bar) => bar.println(text),
            // Whoever reads may have gone away; the run goes on all the same.
            Self::Lines(out) => {
                let _ = writeln!(out, "{text}");
            }
        }
    }

    /// Leaves the bar as it stands.
    fn finish(&self) {
        if let Self::Bar(bar) = self {
            bar.abandon();
        }
    }
}

/// Time left, from how long the latest steps took.
struct Eta {
    last: Instant,
    done: u64,
    seconds_per_unit: Option<f64>,
}

impl Eta {
    fn start(done: u64) -> Self {
        Self { last: Instant::now(), done, seconds_per_unit: None }
    }

    /// The time that the units from `done` to `total` will take; `None` before anything was timed.
    fn update(&mut self, done: u64, total: u64, now: Instant) -> Option<Duration> {
        if done > self.done {
            let latest = now.duration_since(self.last).as_secs_f64() / (done - self.done) as f64;
            // Steps get slower as sequences get longer, so later ones count more.
            self.seconds_per_unit = Some(self.seconds_per_unit.map_or(latest, |mean| 0.8 * mean + 0.2 * latest));
            (self.last, self.done) = (now, done);
        }
        self.seconds_per_unit
            .and_then(|seconds| Duration::try_from_secs_f64(seconds * total.saturating_sub(done) as f64).ok())
    }
}

/// The progress of a training run.
pub struct TrainProgress {
    display: Display,
    total: u64,
    eta: Eta,
}

impl TrainProgress {
    /// For a run of `total_steps` steps of which `start_step` are done.
    pub fn new(total_steps: u64, start_step: u64) -> Self {
        Self::with_display(Display::stderr(total_steps), total_steps, start_step)
    }

    fn with_display(mut display: Display, total: u64, start: u64) -> Self {
        if let Display::Bar(_) = display {
            display.show(start, format!("step {start}/{total}"));
        }
        Self { display, total, eta: Eta::start(start) }
    }

    /// Shows a logged step.
    pub fn update(&mut self, row: &TrainRow) {
        let done = row.step + 1;
        let left = self.eta.update(done, self.total, Instant::now());
        self.display.show(done, train_line(row, self.total, left));
    }

    /// Shows a validation; the line stays.
    pub fn validation(&mut self, row: &ValRow) {
        self.message(&format!("step {}  validation {:.3} bits/byte", row.step + 1, row.val_bits_per_byte));
    }

    /// Shows `message` on a line of its own, above the bar.
    pub fn message(&mut self, message: &str) {
        self.display.line(message);
    }

    /// Ends the display; the bar stays as it is.
    pub fn finish(&self) {
        self.display.finish();
    }
}

impl TrainObserver for TrainProgress {
    fn on_step(&mut self, row: &TrainRow) {
        self.update(row);
    }

    fn on_validation(&mut self, row: &ValRow) {
        self.validation(row);
    }

    fn on_message(&mut self, message: &str) {
        self.message(message);
    }
}

/// The progress through a number of bytes, as when packing a corpus.
pub struct BytesProgress {
    display: Display,
    verb: &'static str,
    total: u64,
    start: Instant,
    eta: Eta,
    shown: Option<Instant>,
}

impl BytesProgress {
    /// For `total` bytes; `verb` says what is done with them, such as `packing`.
    pub fn new(verb: &'static str, total: u64) -> Self {
        Self::with_display(Display::stderr(total), verb, total)
    }

    fn with_display(display: Display, verb: &'static str, total: u64) -> Self {
        Self { display, verb, total, start: Instant::now(), eta: Eta::start(0), shown: None }
    }

    /// `done` bytes are done in all. May be called as often as is convenient: what is shown changes
    /// ten times a second in a terminal, and every ten seconds and at the end in a pipe.
    pub fn update(&mut self, done: u64) {
        let now = Instant::now();
        let every = match self.display {
            Display::Bar(_) => Duration::from_millis(100),
            Display::Lines(_) => LINE_EVERY,
        };
        let waited = now.duration_since(self.shown.unwrap_or(self.start));
        if waited < every && done < self.total {
            return;
        }
        self.shown = Some(now);
        let rate = done as f64 / now.duration_since(self.start).as_secs_f64();
        let left = self.eta.update(done, self.total, now);
        self.display.show(done, bytes_line(self.verb, done, self.total, rate, left));
    }

    /// Ends the display; the bar stays as it is.
    pub fn finish(&self) {
        self.display.finish();
    }
}

fn train_line(row: &TrainRow, total: u64, left: Option<Duration>) -> String {
    let TrainRow { step, bits_per_byte, lr, bytes_per_second, skipped_steps, byte_classes, .. } = row;
    let mut line = format!(
        "step {}/{total}  {bits_per_byte:.3} bits/byte  lr {lr:.1e}  {}/s",
        step + 1,
        DecimalBytes(*bytes_per_second as u64)
    );
    if let Some(classes) = byte_classes {
        line.push_str(&format!(
            "  whitespace {:.3}, other {:.3} bits/byte",
            classes.ws_bits_per_byte, classes.nonws_bits_per_byte
        ));
    }
    if *skipped_steps > 0 {
        line.push_str(&format!("  {skipped_steps} skipped"));
    }
    line + &eta(left)
}

fn bytes_line(verb: &str, done: u64, total: u64, rate: f64, left: Option<Duration>) -> String {
    let (done, total, rate) = (DecimalBytes(done), DecimalBytes(total), DecimalBytes(rate as u64));
    format!("{verb} {done} of {total}  {rate}/s") + &eta(left)
}

fn eta(left: Option<Duration>) -> String {
    left.map_or(String::new(), |left| format!("  eta {}", FormattedDuration(left)))
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::rc::Rc;

    use super::*;

    /// A pipe that the test keeps the other end of.
    #[derive(Clone, Default)]
    struct Pipe(Rc<RefCell<Vec<u8>>>);

    impl Write for Pipe {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.borrow_mut().write(bytes)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Pipe {
        fn lines(&self) -> Vec<String> {
            String::from_utf8(self.0.borrow().clone()).unwrap().lines().map(str::to_owned).collect()
        }
        fn display(&self) -> Display {
            Display::Lines(Box::new(self.clone()))
        }
    }

    fn row(step: u64) -> TrainRow {
        TrainRow {
            step,
            loss: 2.019,
            bits_per_byte: 2.9132,
            lr: 9.8e-4,
            grad_norm: 0.5,
            seq_len: 512,
            bytes_seen: 0,
            bytes_per_second: 3400.0,
            skipped_steps: 0,
            loss_scale: None,
            mfu: None,
            data_wait: 0.0,
            peak_memory_bytes: 0,
            byte_classes: None,
        }
    }

    #[test]
    fn a_step_is_one_line() {
        let left = Some(Duration::from_secs(751));
        let line = "step 121/2000  2.913 bits/byte  lr 9.8e-4  3.40 kB/s  eta 00:12:31";
        assert_eq!(train_line(&row(120), 2000, left), line);
        let skipped = TrainRow { skipped_steps: 2, bits_per_byte: f64::NAN, ..row(0) };
        assert_eq!(train_line(&skipped, 10, None), "step 1/10  NaN bits/byte  lr 9.8e-4  3.40 kB/s  2 skipped");
    }

    #[test]
    fn a_pipe_gets_plain_lines() {
        let pipe = Pipe::default();
        let mut progress = TrainProgress::with_display(pipe.display(), 2000, 100);
        let observer: &mut dyn TrainObserver = &mut progress;
        observer.on_step(&row(100));
        observer.on_message("checkpoint written");
        observer.on_validation(&ValRow { step: 100, val_loss: 2.0, val_bits_per_byte: 2.8854, bytes: 1 });
        progress.finish();
        let lines = pipe.lines();
        assert!(lines[0].starts_with("step 101/2000  2.913 bits/byte"), "{lines:?}");
        assert_eq!(lines[1..], ["checkpoint written", "step 101  validation 2.885 bits/byte"]);
        assert!(!lines.concat().contains('\x1b'));
    }

    #[test]
    fn time_left_follows_the_latest_steps() {
        let mut eta = Eta::start(100);
        let start = eta.last;
        assert_eq!(eta.update(100, 200, start), None);
        // Ten steps of 2 s leave ninety.
        let left = eta.update(110, 200, start + Duration::from_secs(20)).unwrap();
        assert!((left.as_secs_f64() - 180.0).abs() < 1e-6, "{left:?}");
        // Ten of 4 s: 0.8 * 2 + 0.2 * 4 = 2.4 s for each of the eighty that are left.
        let left = eta.update(120, 200, start + Duration::from_secs(60)).unwrap();
        assert!((left.as_secs_f64() - 192.0).abs() < 1e-6, "{left:?}");
        // Past the end there is nothing left.
        assert_eq!(eta.update(210, 200, start + Duration::from_secs(80)), Some(Duration::ZERO));
    }

    #[test]
    fn a_pipe_is_told_of_bytes_rarely_and_at_the_end() {
        let pipe = Pipe::default();
        let mut progress = BytesProgress::with_display(pipe.display(), "packing", 5_000_000);
        for done in (0..=5_000_000).step_by(1000) {
            progress.update(done);
        }
        progress.finish();
        let lines = pipe.lines();
        assert_eq!(lines.len(), 1, "{lines:?}");
        assert!(lines[0].starts_with("packing 5.00 MB of 5.00 MB  "), "{lines:?}");
    }
}

//! The binary as a user meets it: a directory to run it in, and what a run of it said.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::NamedTempFile;

/// Longer than any command here takes, however loaded the machine.
const DEADLINE: Duration = Duration::from_secs(120);

/// A model and a run that take no time.
const TINY: &str = "\
model: {n_layer: 2, d_model: 32, n_head: 2, d_ff: 64}
data: {train: text.bin, seq_len: 16}
optim: {lr: 0.003}
train:
  steps: 6
  batch_size: 2
  precision: fp32
  checkpointing: false
  device: cpu
  log_every: 1
  internals_every: 0
  eval_every: 0
  save_every: 2
  out: run
";

/// A temporary directory with `tiny.yaml`, `text.bin` (16,800 bytes of English, in which no window of 16 bytes or more
/// comes twice) and `golden.pt` (2 layers × 64, trained by the original on `golden.bin`, one line again and again).
/// Commands run in it, so that all paths are short.
pub struct Workspace {
    dir: tempfile::TempDir,
}

impl Workspace {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
        let ws = Self { dir };
        for (from, to) in [
            ("text.bin", "text.bin"),
            ("bitbyte_tiny/text.bin", "golden.bin"),
            ("bitbyte_tiny/final_identity.pt", "golden.pt"),
        ] {
            fs::write(ws.path(to), fs::read(fixtures.join(from)).expect(from)).expect(to);
        }
        ws.write("tiny.yaml", TINY);
        ws
    }

    pub fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Writes a file, and the directories above it.
    pub fn write(&self, name: &str, contents: impl AsRef<[u8]>) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().expect("a parent")).expect("creates directories");
        fs::write(path, contents).expect("writes");
    }

    pub fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    /// The names in a directory, sorted.
    pub fn names(&self, dir: &str) -> Vec<String> {
        let entries = fs::read_dir(self.path(dir)).unwrap_or_else(|e| panic!("{dir}: {e}"));
        let mut names: Vec<String> =
            entries.map(|e| e.expect("an entry").file_name().into_string().expect("UTF-8")).collect();
        names.sort();
        names
    }

    /// The steps of the numbered checkpoints `<stem>-<steps>.pt` in a directory.
    pub fn numbered(&self, dir: &str, stem: &str) -> Vec<u64> {
        let names = self.names(dir);
        let steps =
            names.iter().filter_map(|n| n.strip_prefix(stem)?.strip_prefix('-')?.strip_suffix(".pt")?.parse().ok());
        steps.collect()
    }

    /// Every file below the workspace with its bytes.
    pub fn snapshot(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        let files = walkdir::WalkDir::new(self.dir.path()).into_iter().map(|e| e.expect("an entry"));
        let files = files.filter(|e| e.file_type().is_file());
        files.map(|e| (e.path().to_path_buf(), fs::read(e.path()).expect("reads"))).collect()
    }

    /// The rows of a log.
    pub fn rows(&self, log: &str) -> Vec<Value> {
        self.read(log).lines().map(|line| serde_json::from_str(line).expect("a JSON object")).collect()
    }

    /// The losses of the training steps in a log, by step; a step that stands there twice is an error.
    pub fn losses(&self, log: &str) -> BTreeMap<u64, f64> {
        let mut losses = BTreeMap::new();
        for row in self.rows(log).iter().filter(|row| row.get("loss").is_some()) {
            let step = row["step"].as_u64().expect("a step");
            let earlier = losses.insert(step, row["loss"].as_f64().expect("a loss"));
            assert_eq!(earlier, None, "step {step} stands twice in {log}");
        }
        losses
    }

    /// `bbt` with these arguments, not yet started. `RUST_BACKTRACE` is set so that a panic would show.
    pub fn command(&self, args: &[&OsStr]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bbt"));
        command.args(args);
        self.prepared(command)
    }

    /// `script` by bash, which finds `bbt` in its PATH.
    pub fn shell(&self, script: &str) -> Command {
        let mut command = Command::new("bash");
        command.args(["-c", script]);
        self.prepared(command)
    }

    fn prepared(&self, mut command: Command) -> Command {
        let binary = Path::new(env!("CARGO_BIN_EXE_bbt")).parent().expect("a directory");
        let path = std::env::var("PATH").unwrap_or_default();
        command
            .current_dir(self.dir.path())
            .env("PATH", format!("{}:{path}", binary.display()))
            .env("OMP_NUM_THREADS", "1")
            .env("RUST_BACKTRACE", "1")
            .env_remove("BBT_LOG")
            .env_remove("RANK")
            .env_remove("WORLD_SIZE")
            .env_remove("NO_COLOR")
            .stdin(Stdio::null());
        // Who runs the tests may ignore signals, as nohup and background jobs do, and children inherit that.
        let defaults = || {
            for signal in [libc::SIGHUP, libc::SIGINT, libc::SIGTERM] {
                // SAFETY: no handler is installed, and signal() is allowed between fork and exec.
                unsafe { libc::signal(signal, libc::SIG_DFL) };
            }
            Ok(())
        };
        // SAFETY: the closure allocates nothing and takes no lock.
        unsafe { command.pre_exec(defaults) };
        command
    }

    /// Starts `bbt` with the words of `line`.
    pub fn start(&self, line: &str) -> Running {
        Running::start(self.command(&line.split_whitespace().map(OsStr::new).collect::<Vec<_>>()))
    }

    /// Runs `bbt` with the words of `line` to its end.
    pub fn bbt(&self, line: &str) -> Done {
        self.start(line).wait()
    }

    /// Runs `bbt` with the words of `line`, which must succeed.
    pub fn ok(&self, line: &str) -> Done {
        let done = self.bbt(line);
        assert_eq!(done.status, Some(0), "bbt {line}: {}", done.stderr);
        done
    }
}

/// A command that has ended.
#[derive(Debug)]
pub struct Done {
    /// Exit status; none where a signal ended it.
    pub status: Option<i32>,
    pub stdout: Vec<u8>,
    pub stderr: String,
}

impl Done {
    /// Standard output as text.
    pub fn text(&self) -> String {
        String::from_utf8(self.stdout.clone()).expect("UTF-8 on stdout")
    }

    /// Standard output as one JSON object on one line.
    pub fn json(&self) -> Value {
        let text = self.text();
        assert_eq!(text.lines().count(), 1, "one object: {text}");
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"))
    }
}

/// A command under way. Ends it when dropped.
pub struct Running {
    child: Child,
    stdout: NamedTempFile,
    stderr: NamedTempFile,
    words: String,
}

impl Running {
    pub fn start(mut command: Command) -> Self {
        let words = format!("{command:?}");
        // Files, not pipes: nothing has to be read for the command to go on.
        let file = || NamedTempFile::new().expect("a temporary file");
        let (stdout, stderr) = (file(), file());
        let handle = |file: &NamedTempFile| Stdio::from(file.reopen().expect("a handle"));
        command.stdout(handle(&stdout)).stderr(handle(&stderr));
        let child = command.spawn().unwrap_or_else(|e| panic!("{words}: {e}"));
        Self { child, stdout, stderr, words }
    }

    /// What it has said on standard error so far.
    pub fn stderr(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.stderr.path()).expect("reads")).into_owned()
    }

    /// Waits until `condition` holds, which it must while the command still runs.
    pub fn until(&mut self, what: &str, mut condition: impl FnMut(&mut Self) -> bool) {
        let began = Instant::now();
        while !condition(self) {
            let ended = self.child.try_wait().expect("waits");
            let stderr = self.stderr();
            assert!(ended.is_none(), "{}: ended before {what}: {stderr}", self.words);
            assert!(began.elapsed() < DEADLINE, "{}: never {what}: {stderr}", self.words);
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal by its name, such as `INT`.
    pub fn signal(&self, name: &str) {
        let pid = self.pid();
        let sent = Command::new("bash").args(["-c", &format!("kill -{name} {pid}")]).status().expect("bash");
        assert!(sent.success(), "cannot send SIG{name}");
    }

    /// Ends it with SIGKILL, at once.
    pub fn kill(&mut self) {
        self.child.kill().expect("kills");
        self.child.wait().expect("ends");
    }

    /// Waits for its end.
    pub fn wait(mut self) -> Done {
        let began = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("waits") {
                break status;
            }
            assert!(began.elapsed() < DEADLINE, "{}: never ended: {}", self.words, self.stderr());
            std::thread::sleep(Duration::from_millis(2));
        };
        Done { status: status.code(), stdout: fs::read(self.stdout.path()).expect("reads"), stderr: self.stderr() }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It has ended already in all but a failing test.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

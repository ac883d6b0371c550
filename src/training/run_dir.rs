//! The run directory: where each file of a run lies, which of them make it a run, which checkpoints are kept, and who
//! writes them.
//!
//! `--out runs/tiny` names a directory: the newest checkpoint is `runs/tiny/ckpt.pt`, the log `metrics.jsonl`.
//! `--out models/a.pt` names the checkpoint, so that a folder can hold several runs: the other files have its stem in
//! their names (`a-00000500.pt`, `a.metrics.jsonl`, `a.config.yaml`, `a.tb/`). `--out runs/tiny/ckpt.pt` is the same as
//! `--out runs/tiny`.
//!
//! Each save writes `<stem>-<steps>.pt` and then makes `<stem>.pt` another name (hard link) of it; the last N numbered
//! ones and `<stem>-best.pt` are kept.

use std::collections::HashSet;
use std::fs::{self, File, TryLockError};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use crate::utils::atomic::{WriteError, kind_of, parent, sync_dir, write_bytes};

/// The stem of a run that has a directory to itself.
const STEM: &str = "ckpt";

/// Begins the configuration file that bbt writes. Behind it comes the checksum of what follows the line.
const MARK: &str = "# Written by bbt, checksum ";

/// The files of one run.
#[derive(Debug, Clone)]
pub struct RunDir {
    dir: PathBuf,
    stem: String,
}

/// A run directory that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RunDirError {
    /// There is a run already.
    #[error(
        "{} holds a run already ({found}): continue it with --resume auto, replace it with --allow-overwrite, or choose another --out",
        out.display()
    )]
    Exists {
        /// What `--out` names.
        out: PathBuf,
        /// One of its files.
        found: String,
    },
    /// Another process trains there.
    #[error("{} is in use: {owner} trains there: wait for its end, stop it, or choose another --out", out.display())]
    Busy {
        /// What `--out` names.
        out: PathBuf,
        /// Which process, on which machine.
        owner: String,
    },
    /// Something has the name of one of the run's files that bbt did not make, and would be lost.
    #[error("{} is {what}, which a run would replace: move it away, or choose another --out", path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// A name that another run's checkpoint has.
    #[error("{} is the name of the best checkpoint of the run {}: choose another --out", .0.display(), .1.display())]
    Best(PathBuf, PathBuf),
    /// The file system says no.
    #[error("{}: {source}: choose a writable --out", path.display())]
    Io {
        /// Of what.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file of the run cannot be written.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// Resume was asked for and there is nothing to resume.
    #[error("{} holds no checkpoint to resume from{}", .0.display(), named(.1))]
    NoCheckpoint(PathBuf, Vec<String>),
}

/// The runs of a directory, for a message.
fn named(runs: &[String]) -> String {
    match runs {
        [] => String::new(),
        runs => format!(", no {STEM}.pt, but {}: name one of them", runs.join(", ")),
    }
}

impl RunDir {
    /// The run directory that `out` names.
    pub fn new(out: &Path) -> Self {
        match (out.extension().and_then(|e| e.to_str()), out.file_stem().and_then(|s| s.to_str())) {
            (Some("pt"), Some(stem)) => Self { dir: parent(out).into(), stem: stem.into() },
            _ => Self { dir: out.into(), stem: STEM.into() },
        }
    }

    /// Creates the directory for a new run. With `allow_overwrite` the files of a run that is there are removed,
    /// all of them and no others.
    ///
    /// # Errors
    /// A run is there already and `allow_overwrite` is not set; as [`RunDir::ensure`].
    pub fn create(&self, allow_overwrite: bool) -> Result<(), RunDirError> {
        let files = self.files();
        if let Some(found) = files.first().filter(|_| !allow_overwrite) {
            let found = found.file_name().unwrap_or_default().to_string_lossy().into_owned();
            return Err(RunDirError::Exists { out: self.out(), found });
        }
        self.ensure()?;
        for path in files {
            // A log that is a link is emptied where it lies.
            match path == self.metrics() && path.is_symlink() {
                true => fs::write(&path, b"").map_err(|source| RunDirError::Io { path, source })?,
                false => remove(&path)?,
            }
        }
        Ok(())
    }

    /// Creates the directory where it is missing, and sees that files can be written to it and that nothing is in
    /// their place which they would replace.
    ///
    /// # Errors
    /// It cannot be created or written; a link, a device or a directory has a checkpoint's name; a configuration that
    /// bbt did not write has the name of the run's.
    pub fn ensure(&self) -> Result<(), RunDirError> {
        if let Some(stem) = self.stem.strip_suffix("-best") {
            return Err(RunDirError::Best(self.latest(), self.dir.join(format!("{stem}.pt"))));
        }
        for path in [self.latest(), self.best()] {
            let kind = fs::symlink_metadata(&path).map(|found| found.file_type());
            if let Some(kind) = kind.ok().filter(|kind| !kind.is_file()) {
                return Err(RunDirError::Foreign { path, what: kind_of(kind) });
            }
        }
        let config = self.config();
        if !may_write_config(&config) {
            return Err(RunDirError::Foreign { path: config, what: "a file that bbt did not write" });
        }
        let io = |source| RunDirError::Io { path: self.dir.clone(), source };
        fs::create_dir_all(&self.dir).map_err(io)?;
        let probe = self.dir.join(format!(".{}.probe", self.stem));
        fs::write(&probe, b"").map_err(io)?;
        fs::remove_file(&probe).map_err(io)
    }

    /// Takes the run for this process, until what is returned is dropped or the process ends, however it does.
    /// None where there is nothing to take: the directory does not exist yet, cannot be written, or lies on a file
    /// system without locks. Waits up to `patience` for another process to end.
    ///
    /// # Errors
    /// Another process has it.
    pub fn lock(&self, patience: Duration) -> Result<Option<RunLock>, RunDirError> {
        let path = self.dir.join(format!(".{}.lock", self.stem));
        let began = Instant::now();
        loop {
            let opened = File::options().read(true).write(true).create(true).truncate(false).open(&path);
            let Ok(mut file) = opened else { return Ok(None) };
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::Error(_)) => return Ok(None),
                Err(TryLockError::WouldBlock) if began.elapsed() < patience => {
                    thread::sleep(Duration::from_millis(50));
                    continue;
                }
                Err(TryLockError::WouldBlock) => {
                    let mut owner = String::new();
                    let _ = file.read_to_string(&mut owner);
                    let owner = if owner.is_empty() { "another process".into() } else { owner };
                    return Err(RunDirError::Busy { out: self.out(), owner });
                }
            }
            // Whoever had it may have removed the file in between: a lock counts only under its name.
            let inode = |found: io::Result<fs::Metadata>| found.map(|found| (found.dev(), found.ino())).ok();
            if inode(file.metadata()) != inode(fs::metadata(&path)) {
                continue;
            }
            let host = hostname::get().unwrap_or_default();
            let owner = format!("process {} on {}", std::process::id(), host.display());
            let _ = file.set_len(0).and_then(|()| file.write_all(owner.as_bytes()));
            return Ok(Some(RunLock { path, _file: file }));
        }
    }

    /// What `--out` names.
    fn out(&self) -> PathBuf {
        if self.stem == STEM { self.dir.clone() } else { self.latest() }
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The newest checkpoint.
    pub fn latest(&self) -> PathBuf {
        self.dir.join(format!("{}.pt", self.stem))
    }

    /// The checkpoint with the lowest validation loss.
    pub fn best(&self) -> PathBuf {
        self.dir.join(format!("{}-best.pt", self.stem))
    }

    /// The log, one JSON object a line.
    pub fn metrics(&self) -> PathBuf {
        self.beside("metrics.jsonl")
    }

    /// The directory of TensorBoard's event files.
    pub fn events(&self) -> PathBuf {
        if self.stem == STEM { self.dir.clone() } else { self.dir.join(format!("{}.tb", self.stem)) }
    }

    /// The resolved configuration: `config.yaml`, or where somebody else's file has that name, `ckpt.config.yaml`.
    pub fn config(&self) -> PathBuf {
        let usual = self.beside("config.yaml");
        if may_write_config(&usual) { usual } else { self.dir.join(format!("{}.config.yaml", self.stem)) }
    }

    /// The `config.yaml` that is somebody else's, where there is one.
    pub fn kept_config(&self) -> Option<PathBuf> {
        Some(self.beside("config.yaml")).filter(|usual| *usual != self.config())
    }

    /// A file that has this name in a directory of its own, and the run's stem before it among other runs.
    fn beside(&self, name: &str) -> PathBuf {
        if self.stem == STEM { self.dir.join(name) } else { self.dir.join(format!("{}.{name}", self.stem)) }
    }

    /// The checkpoint after `steps` steps.
    pub fn after(&self, steps: u64) -> PathBuf {
        self.dir.join(format!("{}-{steps:08}.pt", self.stem))
    }

    /// The checkpoint after `steps` steps, which is about to be written. A link of that name, such as one to an
    /// archive, goes; what it points to stays as it is.
    ///
    /// # Errors
    /// The file system's.
    pub fn make_way(&self, steps: u64) -> Result<PathBuf, RunDirError> {
        let path = self.after(steps);
        if path.is_symlink() {
            remove(&path)?;
        }
        Ok(path)
    }

    /// The newest checkpoint there is, if any: what `--resume auto` takes, unless it is damaged.
    pub fn newest(&self) -> Option<PathBuf> {
        self.checkpoints().into_iter().next()
    }

    /// The run's checkpoints in the order in which a run is resumed from them: numbered ones from the newest to the
    /// oldest, then the latest and the best where those are other files.
    pub fn checkpoints(&self) -> Vec<PathBuf> {
        // A run killed between writing a numbered checkpoint and naming it the latest has a newer one.
        let numbered = self.numbered().into_iter().rev().map(|(_, path)| path);
        let mut seen = HashSet::new();
        let mut is_new = |path: &PathBuf| fs::metadata(path).is_ok_and(|found| seen.insert((found.dev(), found.ino())));
        numbered.chain([self.latest(), self.best()]).filter(|path| is_new(path)).collect()
    }

    /// Whether `path` is one of this run's checkpoints, however it is spelled.
    pub fn owns(&self, path: &Path) -> bool {
        let place = |path: &Path| Some((fs::canonicalize(parent(path)).ok()?, path.file_name()?.to_owned()));
        let own = self.numbered().into_iter().map(|(_, path)| path).chain([self.latest(), self.best()]);
        place(path).is_some_and(|place_of| own.into_iter().any(|own| place(&own).is_some_and(|own| own == place_of)))
    }

    /// Renames a numbered checkpoint that is damaged to `NAME.damaged`, so that nothing takes it for a checkpoint of
    /// the run any more, nor removes it. Any other file stays.
    ///
    /// # Errors
    /// The file system's.
    pub fn set_aside(&self, path: &Path) -> Result<(), RunDirError> {
        if self.numbered().iter().any(|(_, numbered)| numbered == path) {
            let aside = path.with_extension("pt.damaged");
            fs::rename(path, aside).map_err(|source| RunDirError::Io { path: path.into(), source })?;
        }
        Ok(())
    }

    /// Makes the checkpoint after `steps` steps the latest, and the best where `best` is set; removes
    /// numbered ones beyond the `keep` newest.
    ///
    /// # Errors
    /// The file system's, with the file.
    pub fn publish(&self, steps: u64, keep: usize, best: bool) -> Result<(), RunDirError> {
        let path = self.after(steps);
        link(&path, &self.latest())?;
        if best {
            link(&path, &self.best())?;
        }
        let numbered = self.numbered();
        // After a resume from an older checkpoint those of the abandoned future are not newer.
        let (past, abandoned): (Vec<_>, Vec<_>) = numbered.into_iter().partition(|(at, _)| *at <= steps);
        let surplus = past.len().saturating_sub(keep);
        for (_, path) in past.iter().take(surplus).chain(&abandoned) {
            remove(path)?;
        }
        Ok(())
    }

    /// Writes the resolved configuration, as YAML.
    ///
    /// # Errors
    /// A file is in its place that bbt did not write; the file system's.
    pub fn write_config(&self, yaml: &str) -> Result<(), RunDirError> {
        let path = self.config();
        if !may_write_config(&path) {
            return Err(RunDirError::Foreign { path, what: "a file that bbt did not write" });
        }
        let text =
            format!("{MARK}{:08x}: replaced when the run goes on, unless it was changed\n{yaml}", checksum(yaml));
        Ok(write_bytes(&path, text.as_bytes())?)
    }

    /// What makes this a run: the files that a new one must not meet, and that replacing it removes. (The
    /// configuration, which is written at every start, is not one of them.)
    fn files(&self) -> Vec<PathBuf> {
        let named = [self.latest(), self.best(), self.metrics()].into_iter().filter(|path| is_there(path));
        let events = entries(&self.events()).filter(|path| {
            let name = path.file_name().unwrap_or_default().as_encoded_bytes();
            name.starts_with(b"events.out.tfevents.") && name.ends_with(super::tensorboard::SUFFIX.as_bytes())
        });
        named.chain(self.numbered().into_iter().map(|(_, path)| path)).chain(events).collect()
    }

    /// Numbered checkpoints, oldest first.
    fn numbered(&self) -> Vec<(u64, PathBuf)> {
        let prefix = format!("{}-", self.stem);
        let steps = |path: &Path| {
            let name = path.file_stem()?.to_str()?;
            let digits = name.strip_prefix(&prefix)?;
            let steps = digits.parse().ok().filter(|steps: &u64| format!("{steps:08}") == digits)?;
            // A run of its own, such as `model-20261130.pt` beside `model.pt`.
            let another = self.dir.join(format!("{name}.config.yaml"));
            (path.extension()? == "pt" && !another.exists()).then_some(steps)
        };
        let mut found: Vec<_> = entries(&self.dir).filter_map(|path| Some((steps(&path)?, path))).collect();
        found.sort();
        found
    }

    /// The error for a directory without a checkpoint of its own.
    pub fn no_checkpoint(&self) -> RunDirError {
        let pt = |path: PathBuf| {
            let name = path.file_name()?.to_str()?;
            // Not those that a run keeps besides its newest.
            let newest = self.dir.join(format!("{}.metrics.jsonl", path.file_stem()?.to_str()?)).exists();
            (name.ends_with(".pt") && newest).then(|| name.to_string())
        };
        let mut runs: Vec<String> = entries(&self.dir).filter_map(pt).collect();
        runs.sort();
        RunDirError::NoCheckpoint(self.out(), runs)
    }
}

/// A run that this process has for itself ([`RunDir::lock`]).
#[derive(Debug)]
pub struct RunLock {
    path: PathBuf,
    // The lock is this open file's: it goes when the file is closed, by whatever ends the process.
    _file: File,
}

impl Drop for RunLock {
    fn drop(&mut self) {
        // While it is still locked: afterwards it might be another process's.
        let _ = fs::remove_file(&self.path);
    }
}

/// Whether something has this name, be it a link to nothing.
fn is_there(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok()
}

/// What lies in a directory; nothing where it cannot be listed.
fn entries(dir: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path())
}

/// Whether there is no file at `path`, or one that is to the byte what bbt wrote.
fn may_write_config(path: &Path) -> bool {
    match fs::symlink_metadata(path) {
        Err(error) => error.kind() == ErrorKind::NotFound,
        Ok(found) => {
            let text = if found.is_file() { fs::read_to_string(path).unwrap_or_default() } else { String::new() };
            let (mark, yaml) = text.split_once('\n').unwrap_or_default();
            mark.strip_prefix(MARK).is_some_and(|rest| rest.starts_with(&format!("{:08x}:", checksum(yaml))))
        }
    }
}

fn checksum(text: &str) -> u32 {
    crc32fast::hash(text.as_bytes())
}

fn remove(path: &Path) -> Result<(), RunDirError> {
    match fs::remove_file(path) {
        Err(source) if source.kind() != ErrorKind::NotFound => Err(RunDirError::Io { path: path.into(), source }),
        _ => Ok(()),
    }
}

/// Gives `from` the further name `to`, replacing what had it, at no moment leaving `to` absent.
fn link(from: &Path, to: &Path) -> Result<(), RunDirError> {
    let io = |source| RunDirError::Io { path: to.into(), source };
    let temporary = to.with_extension("pt.link");
    remove(&temporary)?;
    // A file system without hard links gets a copy.
    if fs::hard_link(from, &temporary).is_err() {
        fs::copy(from, &temporary).map_err(io)?;
        File::open(&temporary).and_then(|file| file.sync_all()).map_err(io)?;
    }
    fs::rename(&temporary, to).map_err(io)?;
    sync_dir(parent(to)).map_err(io)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_or_a_file_names_the_run() {
        let run = RunDir::new(Path::new("runs/tiny"));
        assert_eq!(run.latest(), Path::new("runs/tiny/ckpt.pt"));
        let run = RunDir::new(Path::new("runs/a/model.pt"));
        assert_eq!((run.dir(), run.latest()), (Path::new("runs/a"), "runs/a/model.pt".into()));
        assert_eq!(RunDir::new(Path::new("model.pt")).dir(), Path::new("."));
    }

    #[test]
    fn the_last_n_and_the_best_are_kept() {
        let tmp = tempfile::tempdir().unwrap();
        let run = RunDir::new(tmp.path());
        assert_eq!(run.newest(), None);
        for steps in [10, 20, 30, 40] {
            fs::write(run.after(steps), steps.to_string()).unwrap();
            run.publish(steps, 2, steps == 20).unwrap();
        }
        assert_eq!(run.numbered().iter().map(|(n, _)| *n).collect::<Vec<_>>(), [30, 40]);
        assert_eq!(fs::read_to_string(run.latest()).unwrap(), "40");
        assert_eq!(fs::read_to_string(run.best()).unwrap(), "20");
        assert_eq!(run.newest(), Some(run.after(40)));
        // Resumed from 30: the checkpoint after 40 belongs to a future that no longer is.
        fs::write(run.after(35), "35").unwrap();
        run.publish(35, 2, false).unwrap();
        assert_eq!(run.newest(), Some(run.after(35)));
    }

    #[test]
    fn an_existing_run_is_not_overwritten_unasked() {
        let tmp = tempfile::tempdir().unwrap();
        let run = RunDir::new(tmp.path());
        run.create(false).unwrap();
        fs::write(run.after(1), "x").unwrap();
        run.publish(1, 1, true).unwrap();
        assert!(matches!(run.create(false), Err(RunDirError::Exists { .. })));
        assert!(run.latest().exists());
        run.create(true).unwrap();
        assert_eq!(run.newest(), None);
    }
}

//! The run directory: where each file of a run lies, which checkpoints are kept, which is the newest.
//!
//! For `--out runs/tiny` the newest checkpoint is `runs/tiny/ckpt.pt`; for `--out runs/a/model.pt` it is
//! that file, and its directory is the run directory. Each save writes `<stem>-<steps>.pt` and then makes
//! `<stem>.pt` another name (hard link) of it; the last N numbered ones and `<stem>-best.pt` are kept.

use std::fs;
use std::path::{Path, PathBuf};

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
    #[error("{} holds a run already: continue it with --resume auto, replace it with --allow-overwrite, or choose another --out", .0.display())]
    Exists(PathBuf),
    /// The file system says no.
    #[error("{}: {source}: choose a writable --out", path.display())]
    Io {
        /// Of what.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Resume was asked for and there is nothing to resume.
    #[error("{} holds no checkpoint to resume from", .0.display())]
    NoCheckpoint(PathBuf),
}

impl RunDir {
    /// The run directory that `out` names.
    pub fn new(out: &Path) -> Self {
        match (out.extension().and_then(|e| e.to_str()), out.file_stem().and_then(|s| s.to_str())) {
            (Some("pt"), Some(stem)) => {
                let dir = out.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
                Self { dir: dir.into(), stem: stem.into() }
            }
            _ => Self { dir: out.into(), stem: "ckpt".into() },
        }
    }

    /// Creates the directory for a new run.
    ///
    /// # Errors
    /// A run is there already and `allow_overwrite` is not set, or the directory cannot be written.
    pub fn create(&self, allow_overwrite: bool) -> Result<(), RunDirError> {
        let occupied = self.latest().exists() || !self.numbered().is_empty() || self.metrics().exists();
        if occupied && !allow_overwrite {
            return Err(RunDirError::Exists(self.dir.clone()));
        }
        self.ensure()?;
        for (_, path) in self.numbered() {
            remove(&path)?;
        }
        for path in [self.latest(), self.best(), self.metrics()] {
            remove(&path)?;
        }
        Ok(())
    }

    /// Creates the directory where it is missing, and sees that files can be written to it.
    ///
    /// # Errors
    /// It cannot be created or written.
    pub fn ensure(&self) -> Result<(), RunDirError> {
        let io = |source| RunDirError::Io { path: self.dir.clone(), source };
        fs::create_dir_all(&self.dir).map_err(io)?;
        let probe = self.dir.join(format!(".{}.probe", self.stem));
        fs::write(&probe, b"").map_err(io)?;
        fs::remove_file(&probe).map_err(io)
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
        self.dir.join("metrics.jsonl")
    }

    /// The resolved configuration.
    pub fn config(&self) -> PathBuf {
        self.dir.join("config.yaml")
    }

    /// The checkpoint after `steps` steps.
    pub fn after(&self, steps: u64) -> PathBuf {
        self.dir.join(format!("{}-{steps:08}.pt", self.stem))
    }

    /// The newest checkpoint there is, if any: what `--resume auto` takes.
    pub fn newest(&self) -> Option<PathBuf> {
        // A run killed between writing a numbered checkpoint and naming it the latest has a newer one.
        let numbered = self.numbered().pop().map(|(_, path)| path);
        numbered.or_else(|| Some(self.latest()).filter(|path| path.exists()))
    }

    /// All checkpoints of the run, the newest first; of one file with two names the first.
    pub fn checkpoints(&self) -> Vec<PathBuf> {
        let numbered = self.numbered().into_iter().rev().map(|(_, path)| path);
        numbered.chain([self.latest(), self.best()].into_iter().filter(|path| path.exists())).collect()
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

    /// Numbered checkpoints, oldest first.
    fn numbered(&self) -> Vec<(u64, PathBuf)> {
        let prefix = format!("{}-", self.stem);
        let entries = fs::read_dir(&self.dir).into_iter().flatten().flatten();
        let mut found: Vec<(u64, PathBuf)> = entries
            .filter_map(|entry| {
                let name = entry.file_name().into_string().ok()?;
                let digits = name.strip_prefix(&prefix)?.strip_suffix(".pt")?;
                Some((digits.parse().ok()?, entry.path()))
            })
            .collect();
        found.sort();
        found
    }
}

fn remove(path: &Path) -> Result<(), RunDirError> {
    match fs::remove_file(path) {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
            Err(RunDirError::Io { path: path.into(), source })
        }
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
        fs::File::open(&temporary).and_then(|file| file.sync_all()).map_err(io)?;
    }
    fs::rename(&temporary, to).map_err(io)?;
    let dir = to.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::File::open(dir).and_then(|dir| dir.sync_all()).map_err(io)
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
        assert!(matches!(run.create(false), Err(RunDirError::Exists(_))));
        assert!(run.latest().exists());
        run.create(true).unwrap();
        assert_eq!(run.newest(), None);
    }
}

//! Files that are there whole or not at all: written beside their place, synced, renamed.

use std::ffi::OsString;
use std::fs::{self, File, FileType};
use std::io::ErrorKind::{
    FileTooLarge, InvalidInput, NotFound, PermissionDenied, QuotaExceeded, ReadOnlyFilesystem, StorageFull, Unsupported,
};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

/// A file that could not be written; what was there before is as it was.
#[derive(Debug, thiserror::Error)]
#[error("{}: cannot be written: {source}{}", path.display(), remedy(source))]
pub struct WriteError {
    /// The file.
    pub path: PathBuf,
    /// Why.
    pub source: io::Error,
}

/// The way out of an error of writing, after a colon; empty where there is none to name.
fn remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        PermissionDenied | ReadOnlyFilesystem => ": choose a place that can be written",
        _ => remedy_for_room(error),
    }
}

/// The way out where there is no room for what is written, after a colon; empty for any other error.
pub(crate) fn remedy_for_room(error: &io::Error) -> &'static str {
    match error.kind() {
        StorageFull | QuotaExceeded => ": make room on the disk, or choose another place",
        FileTooLarge => ": raise the limit on the size of a file (`ulimit -f`), or choose another place",
        _ => "",
    }
}

/// Replaces `path` by what `write` writes: a temporary file in the same directory, fsync, rename, fsync of
/// the directory. A crash at any moment leaves the old file or the new one; an error leaves the old one.
/// What a killed process left of the same file before is removed.
///
/// Where `path` is a symbolic link, the file that it points to is replaced, or made, and the link stays.
///
/// # Errors
/// Those of `write` and of the file system; `path` is a device, a pipe or a directory, which is never replaced.
pub fn write_atomic(path: &Path, write: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>) -> Result<(), WriteError> {
    let target = target(path).map_err(|source| WriteError { path: path.into(), source })?;
    let dir = parent(&target);
    let temporary = dir.join(temporary_name(&target, std::process::id()));
    let result = (|| {
        remove_leftovers(&target, dir);
        let mut file = BufWriter::new(File::create(&temporary)?);
        write(&mut file)?;
        file.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()?;
        fs::rename(&temporary, &target)?;
        sync_dir(dir)
    })();
    result.map_err(|source| {
        let _ = fs::remove_file(&temporary);
        WriteError { path: path.into(), source }
    })
}

/// Makes names in the directory `dir` last: what was created in it, renamed or removed is so after a power failure,
/// too. A file system that cannot do that for a directory (CIFS, vboxsf, some of FUSE's) does without: the files
/// themselves are written and synced, and the rest is up to it.
///
/// # Errors
/// The file system's.
pub fn sync_dir(dir: &Path) -> io::Result<()> {
    let synced = File::open(dir).and_then(|dir| dir.sync_all());
    match synced {
        // EINVAL, EOPNOTSUPP and ENOSYS, and EACCES in a directory that may be written, but not listed.
        Err(error) if matches!(error.kind(), InvalidInput | Unsupported | PermissionDenied) => Ok(()),
        other => other,
    }
}

/// The directory that `path` lies in.
pub fn parent(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// The file that is written where `path` is: `path` itself, or what it links to, which need not be there yet.
fn target(path: &Path) -> io::Result<PathBuf> {
    match fs::metadata(path) {
        Ok(found) if found.is_file() => fs::canonicalize(path),
        Ok(found) => Err(io::Error::new(InvalidInput, format!("it is {}, not a file", kind_of(found.file_type())))),
        // A link to nothing: from each link to the next, as many as the kernel follows.
        Err(error) if error.kind() == NotFound => {
            let mut target = path.to_path_buf();
            for _ in 0..40 {
                match fs::read_link(&target) {
                    Ok(next) => target = parent(&target).join(next),
                    Err(_) => return Ok(target),
                }
            }
            Err(error)
        }
        Err(error) => Err(error),
    }
}

/// What is neither a file nor, for [`fs::metadata`], a link, in words.
pub fn kind_of(kind: FileType) -> &'static str {
    match () {
        () if kind.is_dir() => "a directory",
        () if kind.is_symlink() => "a symbolic link",
        () if kind.is_fifo() => "a named pipe (FIFO)",
        () if kind.is_socket() => "a socket",
        () if kind.is_char_device() || kind.is_block_device() => "a device",
        () => "a file",
    }
}

/// `.NAME.PID.tmp`: hidden, and known for whose it is.
fn temporary_name(path: &Path, pid: u32) -> OsString {
    let mut name = OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(format!(".{pid}.tmp"));
    name
}

/// Removes temporary files of `path` whose process is gone. Failing to is no error: they only take room.
fn remove_leftovers(path: &Path, dir: &Path) {
    let Some(name) = path.file_name().and_then(|name| name.to_str()) else { return };
    let prefix = format!(".{name}.");
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let file = entry.file_name();
        let pid = file.to_str().and_then(|f| f.strip_prefix(&prefix)?.strip_suffix(".tmp")?.parse::<u32>().ok());
        if pid.is_some_and(|pid| Path::new("/proc/self").exists() && !Path::new(&format!("/proc/{pid}")).exists()) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// Writes `bytes` to `path` as [`write_atomic`] does.
///
/// # Errors
/// The file system's.
pub fn write_bytes(path: &Path, bytes: &[u8]) -> Result<(), WriteError> {
    write_atomic(path, |file| file.write_all(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn a_failed_write_leaves_the_old_file_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        write_bytes(&path, b"old").unwrap();
        let error = write_atomic(&path, |file| {
            file.write_all(b"half")?;
            Err(io::ErrorKind::StorageFull.into())
        });
        let message = error.unwrap_err().to_string();
        assert!(message.contains("make room") && message.contains(path.to_str().unwrap()), "{message}");
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(names(dir.path()), ["a"]);
        write_bytes(&path, b"new").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
    }

    #[test]
    fn a_link_stays_and_its_target_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let (elsewhere, link) = (dir.path().join("elsewhere"), dir.path().join("link"));
        fs::create_dir(&elsewhere).unwrap();
        std::os::unix::fs::symlink("elsewhere/file", dir.path().join("middle")).unwrap();
        std::os::unix::fs::symlink("middle", &link).unwrap();
        // First it points to nothing.
        for bytes in [b"one", b"two"] {
            write_bytes(&link, bytes).unwrap();
            assert!(link.is_symlink() && dir.path().join("middle").is_symlink());
            assert_eq!(fs::read(elsewhere.join("file")).unwrap(), bytes);
        }
        assert_eq!(names(&elsewhere), ["file"]);
        let message = write_bytes(Path::new("/dev/null"), b"x").unwrap_err().to_string();
        assert!(message.contains("/dev/null") && message.contains("it is a device"), "{message}");
        let message = write_bytes(&elsewhere, b"x").unwrap_err().to_string();
        assert!(message.contains("it is a directory"), "{message}");
        std::os::unix::fs::symlink("loop", dir.path().join("loop")).unwrap();
        assert!(write_bytes(&dir.path().join("loop"), b"x").is_err());
    }

    #[test]
    fn leftovers_of_the_dead_go_and_those_of_the_living_stay() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        // No process has the largest number.
        let (dead, living) = (temporary_name(&path, u32::MAX), temporary_name(&path, 1));
        for name in [&dead, &living] {
            fs::write(dir.path().join(name), "x").unwrap();
        }
        write_bytes(&path, b"new").unwrap();
        assert!(!dir.path().join(dead).exists() && dir.path().join(living).exists());
    }
}

//! Bytes that come from another process: standard input, and what a shell opens for `<(command)`.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::DataError;

/// Bytes read at a time.
const BUFFER: usize = 1 << 20;

/// How long to wait for bytes before asking whether to go on, in milliseconds.
const PATIENCE: u8 = 200;

/// Whether `path` names a stream that this process has been given: `-` for standard input, or `/dev/stdin`, `/dev/fd/63`
/// and the like where that is neither a file nor a directory. A named pipe is none: it may never get a writer.
pub fn is_stream(path: &Path) -> bool {
    let given = ["/dev/fd", "/proc/self/fd"].into_iter().any(|dir| path.starts_with(dir)) || is_stdin(path);
    let no_file = || fs::metadata(path).is_ok_and(|metadata| !metadata.is_file() && !metadata.is_dir());
    path == Path::new("-") || (given && no_file())
}

fn is_stdin(path: &Path) -> bool {
    path == Path::new("-") || path == Path::new("/dev/stdin")
}

/// Copies the stream `from` to its end into the file `to`, which is at `to_path`; returns the number of bytes. `go_on` is
/// asked between reads, and while nothing comes.
///
/// # Errors
/// Either cannot be read or written; what `go_on` says.
pub fn copy(
    from: &Path,
    to: &mut File,
    to_path: &Path,
    mut go_on: impl FnMut() -> Result<(), DataError>,
) -> Result<u64, DataError> {
    let mut stream = open(from).map_err(DataError::io("open", from))?;
    let mut buffer = vec![0; BUFFER];
    let mut bytes = 0;
    loop {
        go_on()?;
        match poll(&mut [PollFd::new(stream.as_fd(), PollFlags::POLLIN)], PollTimeout::from(PATIENCE)) {
            Ok(0) | Err(Errno::EINTR) => continue,
            Ok(_) => {}
            Err(error) => return Err(DataError::io("read", from)(error.into())),
        }
        match stream.read(&mut buffer) {
            Ok(0) => return Ok(bytes),
            Ok(count) => {
                to.write_all(&buffer[..count]).map_err(DataError::io("write", to_path))?;
                bytes += count as u64;
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(error) => return Err(DataError::io("read", from)(error)),
        }
    }
}

fn open(path: &Path) -> io::Result<File> {
    if is_stdin(path) {
        return Ok(File::from(io::stdin().as_fd().try_clone_to_owned()?));
    }
    OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    #[test]
    fn only_what_the_process_was_given_is_a_stream() {
        let dir = tempfile::tempdir().unwrap();
        let file = File::create(dir.path().join("-")).unwrap();
        assert!(is_stream(Path::new("-")));
        for none in [dir.path(), &dir.path().join("-"), Path::new("/dev/fd/9999"), Path::new("/dev/zero")] {
            assert!(!is_stream(none), "{}", none.display());
        }
        assert!(!is_stream(Path::new(&format!("/dev/fd/{}", file.as_raw_fd()))), "a file is read as one");
        let (read, _write) = io::pipe().unwrap();
        assert!(is_stream(Path::new(&format!("/dev/fd/{}", read.as_raw_fd()))));
    }

    #[test]
    fn a_pipe_is_read_to_its_end_and_while_nothing_comes_one_may_stop() {
        let (read, mut write) = io::pipe().unwrap();
        let path = format!("/proc/self/fd/{}", read.as_raw_fd());
        let mut out = tempfile::NamedTempFile::new().unwrap();
        let out_path = out.path().to_path_buf();
        let mut asked = 0;
        let stopped = copy(Path::new(&path), out.as_file_mut(), &out_path, || {
            asked += 1;
            if asked == 2 { Err(DataError::Interrupted) } else { Ok(()) }
        });
        assert!(matches!(stopped, Err(DataError::Interrupted)));
        let writer = std::thread::spawn(move || {
            for _ in 0..300 {
                write.write_all(&[7; 1000]).unwrap();
            }
        });
        assert_eq!(copy(Path::new(&path), out.as_file_mut(), &out_path, || Ok(())).unwrap(), 300_000);
        writer.join().unwrap();
        assert_eq!(fs::read(out_path).unwrap(), [7; 300_000]);
    }
}

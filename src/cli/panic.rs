//! How a panic is reported: as want of memory where it is that, else as a bug of bbt's, with the place in the source.
//!
//! libtorch's failures inside tch are panics, so they end here.

use std::any::Any;
use std::backtrace::{Backtrace, BacktraceStatus};
use std::panic;
use std::sync::{Mutex, PoisonError};

use crate::libtorch;

/// Where a thread panicked.
struct Place {
    /// File, line and column.
    location: String,
    /// Captured where `RUST_BACKTRACE` asks for it.
    backtrace: Backtrace,
}

/// The last panic of any thread: that of the data loader's is passed on to the main thread.
static LAST: Mutex<Option<Place>> = Mutex::new(None);

/// Notes where threads panic, for [`error`]. Nothing is printed: some panics are caught and are no failure.
pub fn note_places() {
    panic::set_hook(Box::new(|info| {
        let location = info.location().map_or("an unknown place".into(), ToString::to_string);
        let place = Place { location, backtrace: Backtrace::capture() };
        *LAST.lock().unwrap_or_else(PoisonError::into_inner) = Some(place);
    }));
}

/// The failure that a caught panic is.
pub fn error(payload: &(dyn Any + Send)) -> anyhow::Error {
    match libtorch::Error::from_panic(payload) {
        error @ libtorch::Error::OutOfMemory(_) => error.into(),
        libtorch::Error::Other(text) => {
            let place = LAST.lock().unwrap_or_else(PoisonError::into_inner).take();
            anyhow::anyhow!(report(&text, place.as_ref()))
        }
    }
}

fn report(text: &str, place: Option<&Place>) -> String {
    let report = format!("internal failure, please report it: {text}");
    match place {
        None => report,
        Some(Place { location, backtrace }) if backtrace.status() == BacktraceStatus::Captured => {
            format!("{report}\nat {location}\n{backtrace}")
        }
        Some(Place { location, .. }) => format!("{report}\nat {location} (RUST_BACKTRACE=1 shows how it came there)"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;
    use tch::{Device, Kind, Tensor};

    /// Run by the test below in processes of its own: the hook is the whole process's.
    #[test]
    #[ignore = "run by a_bug_is_reported_with_its_place"]
    fn libtorch_fails() {
        note_places();
        let zeros = |size: [i64; 2]| Tensor::zeros(size, (Kind::Float, Device::Cpu));
        let payload = panic::catch_unwind(|| zeros([2, 3]).matmul(&zeros([2, 3]))).unwrap_err();
        println!("{}", error(payload.as_ref()));
        let payload = panic::catch_unwind(|| panic!("of our own")).unwrap_err();
        println!("{}", error(payload.as_ref()));
    }

    #[test]
    fn a_bug_is_reported_with_its_place() {
        for backtrace in ["0", "1"] {
            let done = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "cli::panic::tests::libtorch_fails", "--ignored", "--nocapture"])
                .env("RUST_BACKTRACE", backtrace)
                .output()
                .unwrap();
            let text = String::from_utf8(done.stdout).unwrap();
            assert!(done.status.success() && text.contains("1 passed"), "{text}");
            let (libtorchs, ours) = text.split_once("please report it: of our own").expect("two reports");
            assert!(libtorchs.contains("internal failure, please report it: ") && libtorchs.contains("mat1 and mat2"));
            // tch's own file, since it is there that the panic is; who called it is in the backtrace.
            assert!(libtorchs.contains(".rs:"), "{text}");
            assert!(ours.contains("at src/cli/panic.rs:"), "{text}");
            let called = "cli::panic::tests::libtorch_fails";
            assert_eq!(libtorchs.contains(&format!("bbt::{called}")), backtrace == "1", "{text}");
            assert_eq!(text.contains("RUST_BACKTRACE=1 shows"), backtrace == "0", "{text}");
        }
    }

    #[test]
    fn want_of_memory_is_no_bug() {
        let huge = || Tensor::empty([1 << 30, 1 << 28], (Kind::Float, Device::Cpu));
        let error = error(panic::catch_unwind(huge).unwrap_err().as_ref());
        let message = super::super::describe(&error);
        assert!(message.starts_with("out of memory: make train.batch_size"), "{message}");
        assert_eq!(super::super::status(&error), 1);
    }
}

//! How calls into libtorch fail.

use std::any::Any;

use tch::TchError;

/// A call into libtorch failed; the text is libtorch's.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host or a device has less memory than was asked for.
    #[error("out of memory: {0}")]
    OutOfMemory(String),
    /// Anything else.
    #[error("libtorch: {0}")]
    Other(String),
}

/// How libtorch's allocators, CUDA's libraries and C++ say that there is no memory. Text is all there is to go by:
/// libtorch has an exception class only for the GPU's allocator, and tch passes on only the text.
const OUT_OF_MEMORY: [&str; 5] =
    ["out of memory", "Out of Memory", "can't allocate memory", "STATUS_ALLOC_FAILED", "bad_alloc"];

impl Error {
    /// The error that libtorch describes by `text`.
    pub fn new(text: impl Into<String>) -> Self {
        let text = text.into();
        match OUT_OF_MEMORY.iter().any(|words| text.contains(words)) {
            true => Self::OutOfMemory(text),
            false => Self::Other(text),
        }
    }

    /// libtorch's own text.
    pub fn text(&self) -> &str {
        match self {
            Self::OutOfMemory(text) | Self::Other(text) => text,
        }
    }

    /// The error that a panic reports: tch's operators panic if libtorch fails. The first line says what; it is
    /// followed by C++ frames, which are left out.
    pub fn from_panic(payload: &(dyn Any + Send)) -> Self {
        Self::new(first_line(&panic_text(payload)))
    }
}

impl From<TchError> for Error {
    fn from(error: TchError) -> Self {
        Self::new(first_line(&error.to_string()))
    }
}

/// The message of a panic.
pub(super) fn panic_text(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<String>().map(String::as_str).or(payload.downcast_ref::<&str>().copied());
    text.unwrap_or("a panic without a message").to_string()
}

fn first_line(text: &str) -> String {
    // `unwrap` shows an error's line breaks as `\n`.
    let text = text.replace("\\n", "\n");
    text.lines().find(|line| !line.trim().is_empty()).unwrap_or("an error without a message").to_string()
}

/// The value, or a panic if libtorch failed: for forward passes, in which every operation of tch panics.
#[track_caller]
pub(crate) fn or_panic<T>(result: Result<T, Error>) -> T {
    match result {
        Ok(value) => value,
        Err(error) => panic!("{error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::panic::catch_unwind;
    use tch::{Device, Kind, Tensor};

    /// More than any machine has: 2^60 bytes.
    fn huge() -> Result<Tensor, TchError> {
        Tensor::f_empty([1 << 30, 1 << 28], (Kind::Float, Device::Cpu))
    }

    #[test]
    fn an_allocation_that_fails_is_out_of_memory() {
        let error = Error::from(huge().unwrap_err());
        assert!(matches!(&error, Error::OutOfMemory(text) if text.lines().count() == 1), "{error}");
        let payload = catch_unwind(|| huge().unwrap()).unwrap_err();
        let error = Error::from_panic(payload.as_ref());
        assert!(matches!(&error, Error::OutOfMemory(text) if text.lines().count() == 1), "{error}");
        // It stays so when it is passed on as text.
        assert!(matches!(Error::new(error.to_string()), Error::OutOfMemory(_)));
    }

    #[test]
    fn what_the_gpus_libraries_say_is_out_of_memory() {
        for text in [
            "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.32 GiB",
            "CUDA error: out of memory",
            "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
            "std::bad_alloc",
        ] {
            assert!(matches!(Error::new(text), Error::OutOfMemory(_)), "{text}");
        }
    }

    #[test]
    fn another_failure_is_not() {
        let zeros = |size: [i64; 2]| Tensor::zeros(size, (Kind::Float, Device::Cpu));
        let error = Error::from(zeros([2, 3]).f_matmul(&zeros([2, 3])).unwrap_err());
        assert!(matches!(&error, Error::Other(text) if text.contains("mat1 and mat2")), "{error}");
        let payload = catch_unwind(|| zeros([2, 3]).matmul(&zeros([2, 3]))).unwrap_err();
        let error = Error::from_panic(payload.as_ref());
        assert!(matches!(&error, Error::Other(text) if text.contains("mat1 and mat2")), "{error}");
    }
}

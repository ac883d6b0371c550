//! Whose kernel steps AdamW's 8-bit moments on CUDA: bitsandbytes' own, where its library is, or ours.

use std::ffi::c_char;
use std::path::PathBuf;
use std::ptr;

use super::ffi;
use crate::libtorch::Error;

/// Whose kernel [`super::adamw8bit`] takes on CUDA.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AdamW8bitKernel {
    /// That of bitsandbytes, from this library.
    Bitsandbytes(PathBuf),
    /// Ours, for this reason.
    Own(String),
}

impl AdamW8bitKernel {
    /// What is taken in this process: bitsandbytes' where `BBT_BITSANDBYTES` says (a file, a folder, or `none`), else
    /// beside libtorch, as pip installs both. No GPU is needed.
    ///
    /// # Errors
    /// `BBT_BITSANDBYTES` names what is not there, or not bitsandbytes 0.50's library for libtorch's version of CUDA.
    pub fn find() -> Result<Self, Error> {
        let (mut path, mut why): (*mut c_char, *mut c_char) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: places for two strings, of which the call fills one and we free it, as `message` does.
        ffi::check(unsafe { ffi::bbt_bitsandbytes(&mut path, &mut why) })?;
        Ok(match ffi::message(path) {
            Some(path) => Self::Bitsandbytes(path.into()),
            None => Self::Own(ffi::message(why).unwrap_or_default()),
        })
    }

    /// Whose it is, in words.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Bitsandbytes(_) => "bitsandbytes' kernel",
            Self::Own(_) => "bbt's own kernel",
        }
    }
}

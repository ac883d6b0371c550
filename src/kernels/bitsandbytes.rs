//! Which kernel steps AdamW's 8-bit moments on CUDA: that of bitsandbytes if its library is found, or ours.

use std::ffi::c_char;
use std::path::PathBuf;
use std::ptr;

use super::ffi;
use crate::libtorch::Error;

/// The kernel that `adamw8bit` uses on CUDA.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AdamW8bitKernel {
    /// bitsandbytes' kernel, from this library.
    Bitsandbytes(PathBuf),
    /// Our own kernel, and why.
    Own(String),
}

impl AdamW8bitKernel {
    /// The kernel that this process uses. bitsandbytes' library is the one that `BBT_BITSANDBYTES` names (a file, a
    /// folder, or `none`), or else the one beside libtorch, where pip installs it. No GPU is needed.
    ///
    /// # Errors
    /// `BBT_BITSANDBYTES` names a file that is absent, or is not bitsandbytes 0.50's library for libtorch's version of
    /// CUDA.
    pub fn find() -> Result<Self, Error> {
        let (mut path, mut why): (*mut c_char, *mut c_char) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: places for two strings, of which the call fills one and we free it, as `message` does.
        ffi::check(unsafe { ffi::bbt_bitsandbytes(&mut path, &mut why) })?;
        Ok(match ffi::message(path) {
            Some(path) => Self::Bitsandbytes(path.into()),
            None => Self::Own(ffi::message(why).unwrap_or_default()),
        })
    }

    /// Its owner, in words.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Bitsandbytes(_) => "bitsandbytes' kernel",
            Self::Own(_) => "bbt's own kernel",
        }
    }
}

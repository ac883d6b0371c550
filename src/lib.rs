#![doc = include_str!("../README.md")]
#![warn(missing_docs)]
// They panic where nothing can be written; `cli` has `note` and `stdout` instead. Unit tests may print.
#![cfg_attr(not(test), deny(clippy::print_stderr, clippy::print_stdout))]

pub mod cgroup;
pub mod checkpoint;
pub mod cli;
pub mod config;
pub mod data;
pub mod inference;
#[doc(hidden)]
pub mod kernels;
pub mod launch;
#[doc(hidden)]
pub mod libtorch;
pub mod models;
pub mod plot;
pub mod quantization;
pub mod training;
pub mod utils;

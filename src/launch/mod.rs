//! Launching: one process per rank, and what such a process is told in its environment.

mod env;

pub use env::{EnvError, RankEnv};

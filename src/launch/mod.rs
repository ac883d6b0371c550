//! Starts the ranks of a distributed run on this machine and looks after them: torchrun without Python.
//!
//! A run is *nodes* (machines) × *local* processes (one a GPU, as a rule). Each node runs one launcher, which
//! starts its ranks with [torchrun's environment variables](https://docs.pytorch.org/docs/stable/elastic/run.html),
//! passes on what they say line by line, forwards signals, and ends them all when one fails. Linux only. The other
//! side, what a rank reads of these variables, is [`RankEnv`]: it does not matter which launcher has set them.

mod env;
mod error;
mod host;
mod lines;
mod output;
mod process;
mod signals;
mod slurm;
mod supervisor;
mod world;

pub use env::{EnvError, RankEnv};
pub use error::LaunchError;
pub use host::resolve;
pub use signals::{Signal, SignalListener};
pub use slurm::Slurm;
pub use supervisor::Supervisor;
pub use world::World;

//! Training: the loop, schedules, loss, evaluation, and what a run leaves behind.

pub mod ddp;
pub mod evaluation;
mod graph;
mod internals;
mod layout;
pub mod loss;
pub mod lr_scheduler;
pub mod metrics;
mod parallel;
mod run_dir;
pub mod tensorboard;
mod trainer;
pub mod utilisation;
mod watch;
mod zero;

pub use ddp::{Ddp, DdpError, setup_ddp};
pub use run_dir::{RunDir, RunDirError, RunLock};
pub use trainer::{MemoryNeed, Start, Summary, TrainError, Trainer, memory_need};
pub use watch::{OnFailure, Verdict};

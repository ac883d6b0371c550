//! Training: the loop, schedules, loss, evaluation, and what a run leaves behind.

pub mod evaluation;
pub mod loss;
pub mod lr_scheduler;
pub mod metrics;
mod run_dir;
pub mod tensorboard;
mod trainer;

pub use run_dir::{RunDir, RunDirError};
pub use trainer::{MemoryNeed, Start, Summary, TrainError, Trainer, memory_need};

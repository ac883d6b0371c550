//! The integration tests, in one program: each binary would link all of libtorch. `cargo test --test it NAME::` runs
//! those of one file.

mod adamw8bit;
mod allocations;
mod amp;
mod bad_input;
mod cli;
mod common;
mod config_reference;
mod cuda_kernels;
mod distributed;
mod files;
mod golden_ops;
mod golden_training;
mod handover;
mod interchange;
mod internals;
mod kernels;
mod launch;
mod library;
mod machine;
mod make_golden;
mod memory;
mod original_commands;
mod original_rule;
mod python_training;
mod quality;
mod resume;
mod schedules;
mod shim;
mod signals;
mod snapshots;
mod tensorboard;

//! Learning rate and sequence length as pure functions of the step: a resumed run needs no state.

use crate::config::{OptimConfig, Schedule};

/// The learning rate of `step` (from 0) in a run of `total_steps`.
///
/// Linear warmup to `lr` over the warmup steps, then half a cosine down to `lr · min_lr_factor`, or
/// constant.
pub fn lr_for_step(step: u64, total_steps: u64, config: &OptimConfig) -> f64 {
    let warmup = config.warmup(total_steps);
    if step < warmup {
        return config.lr * (step + 1) as f64 / warmup as f64;
    }
    match config.schedule {
        Schedule::Constant => config.lr,
        Schedule::Cosine => {
            let span = total_steps.saturating_sub(warmup).max(1);
            let progress = ((step - warmup) as f64 / span as f64).min(1.0);
            let cosine = 0.5 * (1.0 + (std::f64::consts::PI * progress).cos());
            config.lr * (config.min_lr_factor + (1.0 - config.min_lr_factor) * cosine)
        }
    }
}

/// The sequence length of `step` (from 0) in a run of `total_steps`: that of the last stage of
/// `curriculum` (pairs of fraction of the run and length) which has begun.
pub fn seq_len_for_step(step: u64, total_steps: u64, curriculum: &[(f64, i64)]) -> i64 {
    let fraction = if total_steps == 0 { 0.0 } else { step as f64 / total_steps as f64 };
    let begun = curriculum.iter().take_while(|(start, _)| *start <= fraction).last();
    begun.or(curriculum.first()).map_or(1, |&(_, length)| length)
}

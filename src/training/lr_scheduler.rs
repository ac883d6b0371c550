//! Learning rate, weight decay and sequence length as pure functions of the step: a resumed run needs no state.

use std::f64::consts::PI;

use crate::config::{OptimConfig, Schedule};

/// The learning rate of `step` (from 0) in a run of `total_steps`.
///
/// Linear warmup to `lr` over the warmup steps, then as [`Schedule`] says, to `lr · min_lr_factor` where it falls:
///
/// - `cosine`: half a cosine
/// - `constant`: stays
/// - `wsd`: stays, then over the last `decay_frac` of the run 1 - sqrt(x), x going from 0 to 1. MiniCPM (Hu et al. 2024,
///   arXiv 2404.06395) falls exponentially; Hägele et al. (2024, arXiv 2405.18392) find this shape the best.
/// - `two_stage`: a line, which from `stage_frac` of the run on is the one that would have begun at
///   `lr · stage_lr_factor` (Ma et al. 2024, "The Era of 1-bit LLMs: Training Tips, Code and FAQ", for
///   arXiv 2402.17764)
pub fn lr_for_step(step: u64, total_steps: u64, config: &OptimConfig) -> f64 {
    let warmup = config.warmup(total_steps);
    if step < warmup {
        return config.lr * (step + 1) as f64 / warmup as f64;
    }
    let falling = |peak: f64, share: f64| config.lr * (config.min_lr_factor + (peak - config.min_lr_factor) * share);
    let done = progress(step, warmup, total_steps);
    match config.schedule {
        Schedule::Constant => config.lr,
        Schedule::Cosine => falling(1.0, 0.5 * (1.0 + (PI * done).cos())),
        Schedule::Wsd => {
            let decay = total_steps.saturating_sub(config.decay_steps(total_steps)).max(warmup);
            falling(1.0, 1.0 - progress(step, decay, total_steps).sqrt())
        }
        Schedule::TwoStage => {
            let is_second = step >= config.second_stage(total_steps);
            falling(if is_second { config.stage_lr_factor } else { 1.0 }, 1.0 - done)
        }
    }
}

/// The weight decay of `step` (from 0) in a run of `total_steps`: none in the second stage of `two_stage`, as
/// its authors have it: the magnitude of a latent weight is how sure its ternary value is, and is then left to settle.
pub fn weight_decay_for_step(step: u64, total_steps: u64, config: &OptimConfig) -> f64 {
    match config.schedule {
        Schedule::TwoStage if step >= config.second_stage(total_steps) => 0.0,
        _ => config.weight_decay,
    }
}

/// How far `step` is on the way from step `begin` to step `end`: 0 to 1.
fn progress(step: u64, begin: u64, end: u64) -> f64 {
    let span = end.saturating_sub(begin).max(1);
    (step.saturating_sub(begin) as f64 / span as f64).min(1.0)
}

/// The sequence length of `step` (from 0) in a run of `total_steps`: that of the last stage of
/// `curriculum` (pairs of fraction of the run and length) which has begun.
pub fn seq_len_for_step(step: u64, total_steps: u64, curriculum: &[(f64, i64)]) -> i64 {
    let fraction = if total_steps == 0 { 0.0 } else { step as f64 / total_steps as f64 };
    let begun = curriculum.iter().take_while(|(start, _)| *start <= fraction).last();
    begun.or(curriculum.first()).map_or(1, |&(_, length)| length)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOTAL: u64 = 200;

    /// 20 steps of warmup.
    fn config(schedule: Schedule) -> OptimConfig {
        OptimConfig { schedule, lr: 2e-3, warmup_frac: 0.1, min_lr_factor: 0.05, ..OptimConfig::default() }
    }

    fn close(a: f64, b: f64) {
        assert!((a - b).abs() <= 1e-14 * b.abs().max(1e-3), "{a} is not {b}");
    }

    #[test]
    fn every_schedule_warms_up_in_the_same_line() {
        for schedule in [Schedule::Cosine, Schedule::Constant, Schedule::Wsd, Schedule::TwoStage] {
            for step in 0..20 {
                close(lr_for_step(step, TOTAL, &config(schedule)), 2e-3 * (step + 1) as f64 / 20.0);
            }
            close(lr_for_step(20, TOTAL, &config(schedule)), 2e-3);
        }
    }

    #[test]
    fn wsd_is_constant_and_falls_at_the_end() {
        let config = config(Schedule::Wsd);
        for step in 20..=160 {
            close(lr_for_step(step, TOTAL, &config), 2e-3);
        }
        for step in 160..=TOTAL {
            let x = (step - 160) as f64 / 40.0;
            close(lr_for_step(step, TOTAL, &config), 2e-3 * (0.05 + 0.95 * (1.0 - x.sqrt())));
        }
        close(lr_for_step(2 * TOTAL, TOTAL, &config), 2e-3 * 0.05);
        let never = OptimConfig { decay_frac: 0.0, ..config };
        close(lr_for_step(TOTAL - 1, TOTAL, &never), 2e-3);
        // What no valid configuration has: warmup goes first.
        let late = OptimConfig { decay_frac: 0.5, warmup_steps: Some(150), ..never };
        close(lr_for_step(149, TOTAL, &late), 2e-3);
        close(lr_for_step(175, TOTAL, &late), 2e-3 * (0.05 + 0.95 * (1.0 - 0.5f64.sqrt())));
    }

    #[test]
    fn the_second_stage_has_a_lower_line_and_no_weight_decay() {
        let config = OptimConfig { stage_frac: 0.4, stage_lr_factor: 0.5, ..config(Schedule::TwoStage) };
        for step in 20..=TOTAL {
            let left = 1.0 - (step - 20) as f64 / 180.0;
            let (peak, weight_decay) = if step < 80 { (2e-3, 0.1) } else { (1e-3, 0.0) };
            close(lr_for_step(step, TOTAL, &config), 1e-4 + (peak - 1e-4) * left);
            close(weight_decay_for_step(step, TOTAL, &config), weight_decay);
        }
        // BitNet's own: 1.5e-3 and 1e-3, half way down at the middle, to 0.
        let bitnet = OptimConfig { lr: 1.5e-3, min_lr_factor: 0.0, warmup_steps: Some(0), ..OptimConfig::default() };
        let bitnet = OptimConfig { schedule: Schedule::TwoStage, ..bitnet };
        close(lr_for_step(99, TOTAL, &bitnet), 1.5e-3 * (1.0 - 99.0 / 200.0));
        close(lr_for_step(100, TOTAL, &bitnet), 5e-4);
        close(lr_for_step(TOTAL, TOTAL, &bitnet), 0.0);
        for schedule in [Schedule::Cosine, Schedule::Constant, Schedule::Wsd] {
            let config = OptimConfig { schedule, ..bitnet.clone() };
            assert!((0..TOTAL).all(|step| weight_decay_for_step(step, TOTAL, &config) == 0.1));
        }
    }
}

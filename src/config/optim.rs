//! Section `optim`: the optimizer and the learning-rate schedule.

use serde::{Deserialize, Serialize};

use super::check::{positive, up_to_one, within};
use super::error::{ConfigError, invalid};

/// Optimizer and learning-rate schedule.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OptimConfig {
    /// Which optimizer.
    pub name: OptimizerName,
    /// Peak learning rate.
    pub lr: f64,
    /// AdamW's betas: the decay rates of the first and the second moment.
    pub betas: (f64, f64),
    /// AdamW's epsilon.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// The gradient is clipped to this L2 norm. 0 means no clipping.
    pub grad_clip: f64,
    /// Shape of the learning-rate schedule after warmup. `two_stage` changes the weight decay, too.
    pub schedule: Schedule,
    /// Warmup: fraction of the run over which the learning rate rises linearly.
    pub warmup_frac: f64,
    /// Warmup in steps. null means that `warmup_frac` gives it.
    pub warmup_steps: Option<u64>,
    /// The last learning rate, as a fraction of `lr`.
    pub min_lr_factor: f64,
    /// For `wsd`: the last fraction of the run, over which the learning rate falls.
    pub decay_frac: f64,
    /// For `two_stage`: fraction of the run at which the second stage begins.
    pub stage_frac: f64,
    /// For `two_stage`: peak learning rate of the second stage, as a fraction of `lr`.
    pub stage_lr_factor: f64,
    /// To which parameters weight decay applies.
    pub decay: Decay,
}

/// The optimizer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum OptimizerName {
    /// AdamW with fp32 moments, as torch.optim.AdamW.
    AdamW,
    /// AdamW with 8-bit moments, as bitsandbytes' AdamW8bit (Dettmers et al. 2022, arXiv 2110.02861).
    AdamW8bit,
}

/// Shape of the learning rate after warmup.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Schedule {
    /// Half a cosine, from `lr` down to `min_lr_factor`.
    Cosine,
    /// `lr` to the end.
    Constant,
    /// Warmup, stable, decay (MiniCPM, Hu et al. 2024, arXiv 2404.06395): `lr`, then a fall to `min_lr_factor` as
    /// 1 - sqrt.
    Wsd,
    /// The schedule of BitNet b1.58 (Ma et al. 2024, arXiv 2402.17764): a linear fall to `min_lr_factor`, with a lower
    /// peak and no weight decay in the second stage.
    TwoStage,
}

/// To which parameters weight decay applies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Decay {
    /// To every parameter, as in the original.
    All,
    /// To parameters of two or more dimensions: the embedding and the linear layers, but not the norms.
    Matrices,
}

impl Default for OptimConfig {
    fn default() -> Self {
        Self {
            name: OptimizerName::AdamW,
            lr: 1e-3,
            betas: (0.9, 0.95),
            eps: 1e-8,
            weight_decay: 0.1,
            grad_clip: 1.0,
            schedule: Schedule::Cosine,
            warmup_frac: 0.03,
            warmup_steps: None,
            min_lr_factor: 0.1,
            decay_frac: 0.2,
            stage_frac: 0.5,
            // From 1.2e-3 to 8e-4, as the 1.3B and larger models of the "Training Tips".
            stage_lr_factor: 2.0 / 3.0,
            decay: Decay::All,
        }
    }
}

impl OptimConfig {
    /// Number of warmup steps in a run of `steps`.
    pub fn warmup(&self, steps: u64) -> u64 {
        // Rounded down, as Python's int().
        self.warmup_steps.unwrap_or((self.warmup_frac * steps as f64) as u64)
    }

    /// Number of steps over which `wsd` decays, the last of a run of `steps`.
    pub fn decay_steps(&self, steps: u64) -> u64 {
        (self.decay_frac * steps as f64) as u64
    }

    /// The step with which the second stage of `two_stage` begins.
    pub fn second_stage(&self, steps: u64) -> u64 {
        (self.stage_frac * steps as f64) as u64
    }

    /// Checks the section for a run of `steps` steps.
    pub(super) fn validate(&self, steps: u64) -> Result<(), ConfigError> {
        positive("optim.lr", self.lr)?;
        within("optim.betas", self.betas.0, 0.0..1.0)?;
        within("optim.betas", self.betas.1, 0.0..1.0)?;
        positive("optim.eps", self.eps)?;
        within("optim.weight_decay", self.weight_decay, 0.0..f64::MAX)?;
        within("optim.grad_clip", self.grad_clip, 0.0..f64::MAX)?;
        within("optim.warmup_frac", self.warmup_frac, 0.0..1.0)?;
        up_to_one("optim.min_lr_factor", self.min_lr_factor)?;
        up_to_one("optim.decay_frac", self.decay_frac)?;
        up_to_one("optim.stage_frac", self.stage_frac)?;
        up_to_one("optim.stage_lr_factor", self.stage_lr_factor)?;
        if self.schedule == Schedule::TwoStage && self.stage_lr_factor < self.min_lr_factor {
            return Err(invalid(
                "optim.stage_lr_factor",
                format!(
                    "{} is less than optim.min_lr_factor {}, with which the run ends: lower that one",
                    self.stage_lr_factor, self.min_lr_factor
                ),
            ));
        }
        let warmup = self.warmup(steps);
        let decay = self.decay_steps(steps);
        if self.schedule == Schedule::Wsd && decay > steps.saturating_sub(warmup) {
            return Err(invalid(
                "optim.decay_frac",
                format!(
                    "{decay} of {steps} steps of decay and {warmup} of warmup do not fit into the run: \
                     lower it or the warmup"
                ),
            ));
        }
        Ok(())
    }
}

//! Section `ddp`: training by several processes.

use serde::{Deserialize, Serialize};

use super::check::at_least;
use super::error::{ConfigError, invalid};

/// Training by many processes, one per rank.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DdpConfig {
    /// What carries tensors between ranks.
    pub backend: Backend,
    /// Seconds after which a rank that others wait for counts as lost.
    pub timeout: u64,
    /// Gradients are averaged in buckets of so many MiB.
    pub bucket_cap_mb: i64,
    /// 1: each rank keeps and steps its part of the optimizer's state (ZeRO stage 1, Rajbhandari et al. 2020,
    /// arXiv 1910.02054); 0: all of it.
    pub zero_stage: u8,
}

/// What carries tensors between ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Backend {
    /// NCCL on GPUs, Gloo on CPUs.
    Auto,
    /// NVIDIA's collectives, between GPUs.
    Nccl,
    /// TCP.
    Gloo,
}

impl Default for DdpConfig {
    fn default() -> Self {
        Self { backend: Backend::Auto, timeout: 600, bucket_cap_mb: 25, zero_stage: 0 }
    }
}

impl DdpConfig {
    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        at_least("ddp.timeout", self.timeout as i64, 1)?;
        at_least("ddp.bucket_cap_mb", self.bucket_cap_mb, 1)?;
        if self.zero_stage > 1 {
            return Err(invalid("ddp.zero_stage", format!("{} is not 0 or 1", self.zero_stage)));
        }
        Ok(())
    }
}

//! Section `ddp`: training by several processes.

use serde::{Deserialize, Serialize};

use super::check::at_least;
use super::error::{ConfigError, invalid};

/// Data-parallel training, one process per rank.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DdpConfig {
    /// Backend of the collectives between ranks.
    pub backend: Backend,
    /// Seconds that a collective waits for a rank before the rank counts as lost.
    pub timeout: u64,
    /// Size of the buckets in which gradients are averaged, in MiB.
    pub bucket_cap_mb: i64,
    /// 1: ZeRO stage 1 (Rajbhandari et al. 2020, arXiv 1910.02054), each rank holds and updates its part of the optimizer
    /// state. 0: each rank holds all of it.
    pub zero_stage: u8,
}

/// Backend of the collectives between ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Backend {
    /// NCCL on GPUs, Gloo on CPUs.
    Auto,
    /// NCCL, between GPUs.
    Nccl,
    /// Gloo, over TCP.
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

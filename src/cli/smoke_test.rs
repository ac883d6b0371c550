//! `bbt train --smoke-test`: does everything work here?

use std::fs;

use anyhow::Context;
use rand::rngs::StdRng;
use rand::{RngCore, SeedableRng};

use crate::config::{ConfigError, Layers};

/// Bytes to train on: more than the run reads.
const BYTES: usize = 1 << 16;

/// A few steps of a tiny model on random bytes, as the original's `--smoke_test`. Everything is in a temporary directory,
/// which is deleted when this is dropped.
pub struct SmokeTest {
    dir: tempfile::TempDir,
}

impl SmokeTest {
    /// Writes the random bytes, the same on every rank.
    ///
    /// # Errors
    /// No temporary directory can be made.
    pub fn new() -> anyhow::Result<Self> {
        let dir = tempfile::tempdir().context("--smoke-test: cannot make a temporary directory (TMPDIR)")?;
        let mut bytes = vec![0; BYTES];
        StdRng::seed_from_u64(0).fill_bytes(&mut bytes);
        fs::write(dir.path().join("random.bin"), bytes).context("--smoke-test")?;
        Ok(Self { dir })
    }

    /// Puts the smoke test's model, data and length over what was given, as the original does; the optimizer, the device,
    /// precision and the rest are the user's.
    ///
    /// # Errors
    /// A temporary directory whose name is not UTF-8.
    pub fn apply(&self, layers: &mut Layers) -> Result<(), ConfigError> {
        let flag = "--smoke-test";
        let path = |name: &str| self.dir.path().join(name).display().to_string();
        let steps = layers.given()?.train.steps.min(10);
        for (key, value) in [
            ("model.n_layer", 2),
            ("model.d_model", 64),
            ("model.n_head", 4),
            ("model.d_ff", 128),
            ("data.seq_len", 64),
            ("train.batch_size", 2),
            ("train.grad_accum", 1),
            ("train.log_every", 1),
        ] {
            layers.set(flag, key, value)?;
        }
        layers.set(flag, "model.attention", "math")?;
        layers.set(flag, "train.steps", steps)?;
        layers.set(flag, "data.train", path("random.bin"))?;
        layers.set(flag, "train.out", path("run"))
    }
}

//! Section `data`: what is read, and in which order.

use serde::{Deserialize, Serialize};

use super::check::at_least;
use super::error::{ConfigError, invalid};

/// Default of `data.seq_len`.
pub(super) const DEFAULT_SEQ_LEN: i64 = 512;

/// What is read, and in which order.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DataConfig {
    /// Training data: a directory of `shard_*.bin` files, a glob, or one file of any bytes.
    pub train: String,
    /// Validation data, in the same forms. null means no evaluation during training.
    pub val: Option<String>,
    /// Order in which the training windows are read.
    pub order: Order,
    /// Sequence length: the bytes predicted per window. null means 512, unless there is a curriculum.
    pub seq_len: Option<i64>,
    /// A sequence length that grows, in place of `seq_len`: pairs of the fraction of the run and the sequence length from
    /// there on, as in [[0.0, 2048], [0.5, 4096]].
    pub curriculum: Option<Vec<(f64, i64)>>,
    /// Random seed of the order.
    pub seed: u64,
}

/// The order of the training windows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Order {
    /// Every window once per epoch, each epoch in a new permutation.
    Shuffled,
    /// Windows that start at any byte, drawn uniformly with replacement; the one epoch has no end.
    Random,
    /// The order of the file, again and again.
    Sequential,
}

impl Default for DataConfig {
    fn default() -> Self {
        Self {
            train: "corpus/train".into(),
            val: None,
            order: Order::Shuffled,
            seq_len: None,
            curriculum: None,
            seed: 1234,
        }
    }
}

impl DataConfig {
    /// The stages of the run: the fraction at which each begins, and its sequence length. A fixed length is one stage.
    pub fn curriculum(&self) -> Vec<(f64, i64)> {
        match &self.curriculum {
            Some(stages) => stages.clone(),
            None => vec![(0.0, self.seq_len.unwrap_or(DEFAULT_SEQ_LEN))],
        }
    }

    /// The longest sequence length of the run. Evaluation uses it unless `train.eval_seq_len` is set.
    pub fn max_seq_len(&self) -> i64 {
        self.curriculum().iter().map(|&(_, length)| length).max().unwrap_or(DEFAULT_SEQ_LEN)
    }

    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        if let Some(length) = self.seq_len {
            at_least("data.seq_len", length, 1)?;
        }
        if let Some(stages) = &self.curriculum {
            let key = "data.curriculum";
            match stages.first() {
                Some((start, _)) if *start == 0.0 => {}
                _ => {
                    return Err(invalid(
                        key,
                        "the first stage must start at fraction 0.0, as in [[0.0, 2048], [0.5, 4096]]",
                    ));
                }
            }
            if stages.windows(2).any(|pair| pair[0].0 >= pair[1].0) || stages.iter().any(|s| !(0.0..1.0).contains(&s.0))
            {
                return Err(invalid(key, "fractions of the run must rise from 0.0 and stay below 1.0"));
            }
            for &(_, length) in stages {
                at_least(key, length, 1)?;
            }
        }
        Ok(())
    }
}

//! Section `model`: the shape of the model.

use serde::{Deserialize, Serialize};

use super::check::{at_least, positive};
use super::error::{ConfigError, invalid};

/// Size of the vocabulary: the 256 bytes.
pub const VOCAB_SIZE: i64 = 256;

/// Shape of the model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ModelConfig {
    /// Number of transformer blocks.
    pub n_layer: i64,
    /// Width of the residual stream.
    pub d_model: i64,
    /// Number of query heads. It must divide `d_model`.
    pub n_head: i64,
    /// Number of key and value heads, for grouped-query attention. null means as many as `n_head`.
    pub n_kv_head: Option<i64>,
    /// Width of the SwiGLU hidden layer.
    pub d_ff: i64,
    /// Base of the rotary position embedding.
    pub rope_base: f64,
    /// How attention is computed.
    pub attention: Attention,
}

/// How attention is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Attention {
    /// bbt's own kernels on the CPU, and libtorch's `scaled_dot_product_attention` elsewhere.
    Auto,
    /// libtorch's `scaled_dot_product_attention`.
    Sdpa,
    /// Softmax(q kᵀ / sqrt(d)) v, written out in libtorch's operators.
    Math,
}

impl Default for ModelConfig {
    fn default() -> Self {
        Self {
            n_layer: 24,
            d_model: 1536,
            n_head: 12,
            n_kv_head: None,
            d_ff: 4096,
            rope_base: 10000.0,
            attention: Attention::Auto,
        }
    }
}

impl ModelConfig {
    /// Number of key and value heads.
    pub fn kv_heads(&self) -> i64 {
        self.n_kv_head.unwrap_or(self.n_head)
    }

    /// Width of one head.
    pub fn head_dim(&self) -> i64 {
        self.d_model / self.n_head
    }

    /// Number of trained values. The output head shares the embedding's values, which are counted once.
    pub fn parameters(&self) -> i64 {
        let kv = self.kv_heads() * self.head_dim();
        let attention = 2 * self.d_model * self.d_model + 2 * self.d_model * kv;
        let mlp = 3 * self.d_model * self.d_ff;
        VOCAB_SIZE * self.d_model + self.n_layer * (attention + mlp + 2 * self.d_model) + self.d_model
    }

    /// Checks that a model of this shape exists.
    ///
    /// # Errors
    /// The first key that does not fit.
    pub fn validate(&self) -> Result<(), ConfigError> {
        at_least("model.n_layer", self.n_layer, 1)?;
        at_least("model.d_model", self.d_model, 1)?;
        at_least("model.n_head", self.n_head, 1)?;
        at_least("model.d_ff", self.d_ff, 1)?;
        if self.d_model % self.n_head != 0 {
            return Err(invalid(
                "model.n_head",
                format!("{} heads do not divide model.d_model {}", self.n_head, self.d_model),
            ));
        }
        if self.head_dim() % 2 != 0 {
            return Err(invalid(
                "model.n_head",
                format!("d_model / n_head is {}, but rotary embeddings need an even head width", self.head_dim()),
            ));
        }
        if let Some(kv) = self.n_kv_head {
            at_least("model.n_kv_head", kv, 1)?;
            if self.n_head % kv != 0 {
                return Err(invalid(
                    "model.n_kv_head",
                    format!("{kv} key/value heads do not divide model.n_head {}", self.n_head),
                ));
            }
        }
        // Above this limit, sizes in bytes would overflow 64 bits.
        for (key, value) in [("n_layer", self.n_layer), ("d_model", self.d_model), ("d_ff", self.d_ff)] {
            if value > 1 << 20 {
                return Err(invalid(&format!("model.{key}"), format!("{value} is more than {}", 1 << 20)));
            }
        }
        positive("model.rope_base", self.rope_base)
    }
}

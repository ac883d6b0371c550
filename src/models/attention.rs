//! Causal multi-head self-attention with rotary positions and grouped key/value heads
//! (Vaswani et al. 2017; GQA: Ainslie et al. 2023, arXiv 2305.13245).

use tch::{Kind, Tensor, nn};

use super::Rope;
use crate::config::{self, ModelConfig, QuantConfig};
use crate::kernels::causal_attention;
use crate::libtorch::or_panic;
use crate::quantization::{BitLinear, Input};

/// Causal self-attention over BitLinear projections.
#[derive(Debug)]
pub struct Attention {
    q_proj: BitLinear,
    k_proj: BitLinear,
    v_proj: BitLinear,
    o_proj: BitLinear,
    n_head: i64,
    kv_heads: i64,
    head_dim: i64,
    kernel: config::Attention,
}

impl Attention {
    /// Adds `{q,k,v,o}_proj.weight` to `vs`.
    pub fn new(vs: nn::Path, config: &ModelConfig, quant: &QuantConfig) -> Self {
        let (d, kv) = (config.d_model, config.kv_heads() * config.head_dim());
        Self {
            q_proj: BitLinear::new(&vs / "q_proj", d, d, false, quant),
            k_proj: BitLinear::new(&vs / "k_proj", d, kv, false, quant),
            v_proj: BitLinear::new(&vs / "v_proj", d, kv, false, quant),
            o_proj: BitLinear::new(&vs / "o_proj", d, d, false, quant),
            n_head: config.n_head,
            kv_heads: config.kv_heads(),
            head_dim: config.head_dim(),
            kernel: config.attention,
        }
    }

    /// # Shapes
    /// `x`: `[B, T, d_model]` → the same. `rope` holds the angles of the T positions.
    /// With a `cache`, x's tokens follow the cached ones, attend to them, and are added to it.
    pub fn forward(&self, x: Input, rope: &Rope, cache: Option<&mut LayerCache>) -> Tensor {
        let [q, k, v] = BitLinear::forward_each([&self.q_proj, &self.k_proj, &self.v_proj], x);
        let (b, t, d) = q.size3().expect("attention takes [B, T, d_model]");
        let heads = |y: Tensor, n: i64| y.view([b, t, n, self.head_dim]);
        let q = rope.apply(&heads(q, self.n_head)).transpose(1, 2); // [B, H, T, D]
        let k = rope.apply(&heads(k, self.kv_heads)).transpose(1, 2); // [B, Hkv, T, D]
        let v = heads(v, self.kv_heads).transpose(1, 2);
        let (k, v) = match cache {
            None => (k, v),
            Some(cache) => cache.extend(&k, &v),
        };
        let y = match self.kernel {
            config::Attention::Auto if has_fused(&q, &k, &v) => fused(&q, &k, &v),
            config::Attention::Auto | config::Attention::Sdpa => sdpa(&q, &k, &v),
            config::Attention::Math => math(&q, &k, &v),
        };
        self.o_proj.forward(&y.transpose(1, 2).reshape([b, t, d]))
    }

    pub(super) fn set_quantization(&mut self, lambda: f64) {
        for projection in [&mut self.q_proj, &mut self.k_proj, &mut self.v_proj, &mut self.o_proj] {
            projection.set_quantization(lambda);
        }
    }

    /// The quantized layers by name, in the order of the parameters.
    pub(super) fn layers(&self) -> [(&'static str, &BitLinear); 4] {
        let Self { q_proj, k_proj, v_proj, o_proj, .. } = self;
        [("q_proj", q_proj), ("k_proj", k_proj), ("v_proj", v_proj), ("o_proj", o_proj)]
    }

    pub(super) fn freeze(&mut self) {
        for projection in [&mut self.q_proj, &mut self.k_proj, &mut self.v_proj, &mut self.o_proj] {
            projection.freeze();
        }
    }

    /// Another handle to the same tensors.
    pub fn shallow_clone(&self) -> Self {
        Self {
            q_proj: self.q_proj.shallow_clone(),
            k_proj: self.k_proj.shallow_clone(),
            v_proj: self.v_proj.shallow_clone(),
            o_proj: self.o_proj.shallow_clone(),
            ..*self
        }
    }
}

/// Which of S keys each of T queries may see, the queries being the last T positions: `[T, S]` bool.
fn causal_mask(t: i64, s: i64, device: tch::Device) -> Tensor {
    Tensor::ones([t, s], (Kind::Bool, device)).tril(s - t)
}

/// Whether our kernels compute this: causal attention of T tokens over themselves, on the CPU.
fn has_fused(q: &Tensor, k: &Tensor, v: &Tensor) -> bool {
    q.device() == tch::Device::Cpu && q.size()[2] == k.size()[2] && matches!(v.kind(), Kind::Float | Kind::BFloat16)
}

fn fused(q: &Tensor, k: &Tensor, v: &Tensor) -> Tensor {
    let (q, k) = (q.to_kind(v.kind()), k.to_kind(v.kind()));
    // Shapes and dtypes fit, and the command line has seen to the kernels asked for.
    or_panic(causal_attention(&q, &k, v))
}

fn sdpa(q: &Tensor, k: &Tensor, v: &Tensor) -> Tensor {
    let (t, s) = (q.size()[2], k.size()[2]);
    let gqa = q.size()[1] != k.size()[1];
    // is_causal aligns queries to the first keys, so it serves only where there is nothing before them;
    // a single query sees everything.
    let mask = (t > 1 && t != s).then(|| causal_mask(t, s, q.device()));
    Tensor::scaled_dot_product_attention(q, k, v, mask, 0.0, t > 1 && t == s, None, gqa)
}

/// softmax(q kᵀ / sqrt(D)) v, the softmax in fp32.
fn math(q: &Tensor, k: &Tensor, v: &Tensor) -> Tensor {
    let group = q.size()[1] / k.size()[1];
    let (k, v) = (k.repeat_interleave_self_int(group, 1, None), v.repeat_interleave_self_int(group, 1, None));
    let (t, s, d) = (q.size()[2], k.size()[2], q.size()[3]);
    let scores = q.matmul(&k.transpose(-2, -1)).to_kind(Kind::Float) / (d as f64).sqrt(); // [B, H, T, S]
    let hidden = causal_mask(t, s, q.device()).logical_not();
    let weights = scores.masked_fill(&hidden, f64::NEG_INFINITY).softmax(-1, Kind::Float);
    weights.to_kind(v.kind()).matmul(&v)
}

/// Keys and values of the tokens seen so far in one layer, `[B, Hkv, capacity, D]`; the room doubles
/// when it is full.
#[derive(Debug, Default)]
pub struct LayerCache {
    keys: Option<Tensor>,
    values: Option<Tensor>,
    len: i64,
}

impl LayerCache {
    /// Number of tokens held.
    pub fn len(&self) -> i64 {
        self.len
    }

    /// Whether nothing is held.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Adds `[B, Hkv, T, D]` keys and values; returns all of them, `[B, Hkv, len, D]`.
    fn extend(&mut self, k: &Tensor, v: &Tensor) -> (Tensor, Tensor) {
        let all = (append(&mut self.keys, self.len, k), append(&mut self.values, self.len, v));
        self.len += k.size()[2];
        all
    }
}

/// Writes `new` behind the first `len` positions of `room`; returns everything up to its end.
fn append(room: &mut Option<Tensor>, len: i64, new: &Tensor) -> Tensor {
    let mut size = new.size();
    let (t, end) = (size[2], len + size[2]);
    let held = match room.take() {
        Some(held) if held.size()[2] >= end => held,
        full => {
            size[2] = 2 * end;
            let grown = Tensor::zeros(size, (new.kind(), new.device()));
            if let Some(full) = full {
                grown.narrow(2, 0, len).copy_(&full.narrow(2, 0, len));
            }
            grown
        }
    };
    held.narrow(2, len, t).copy_(new);
    let all = held.narrow(2, 0, end);
    *room = Some(held);
    all
}

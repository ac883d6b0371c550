//! BitByteLM: a byte-level transformer with ternary linear layers.
//!
//! - vocabulary: the 256 bytes; the head is the embedding, transposed (tied weights)
//! - BitLinear in attention and MLP: ternary weights, int8 activations per token (BitNet b1.58)
//! - pre-norm RMSNorm, rotary positions, SwiGLU, grouped-query attention, no biases, no dropout
//! - the residual stream stays fp32; under autocast only products run in the lower precision
//!
//! Parameter names, shapes and initialisation are those of the PyTorch original: its checkpoints load
//! strictly.

use tch::{Tensor, nn};

use super::block::RMS_EPS;
use super::rope::RopeTables;
use super::{Block, LayerCache, RmsNorm, Rope};
use crate::config::{ModelConfig, QuantConfig, QuantKernel, VOCAB_SIZE};
use crate::libtorch::drawing_alone;
use crate::quantization::BitLinear;

/// The language model.
#[derive(Debug)]
pub struct BitByteLM {
    /// Token embedding and output head, `[256, d_model]`.
    tok_emb: Tensor,
    blocks: Vec<Block>,
    norm_f: RmsNorm,
    config: ModelConfig,
    checkpointing: bool,
    rope: RopeTables,
}

/// Keys and values of every layer for the tokens seen so far.
#[derive(Debug)]
pub struct KvCache {
    layers: Vec<LayerCache>,
}

impl BitByteLM {
    /// Adds all parameters to `vs`, in the order of PyTorch's `parameters()`. The configuration must be
    /// valid ([`crate::config::Config::validate`]).
    ///
    /// The embedding is drawn from N(0, 1 / sqrt(d_model)) (that being the standard deviation), the linear
    /// layers Kaiming-uniform with a = sqrt(5).
    pub fn new(vs: &nn::Path, config: &ModelConfig, quant: &QuantConfig) -> Self {
        let stdev = 1.0 / (config.d_model as f64).sqrt();
        let normal = nn::Init::Randn { mean: 0.0, stdev };
        let tok_emb = drawing_alone(|| (vs / "tok_emb").var("weight", &[VOCAB_SIZE, config.d_model], normal));
        let blocks = (0..config.n_layer).map(|i| Block::new(vs / "blocks" / i, config, quant)).collect();
        let norm_f = RmsNorm::new(vs / "norm_f", config.d_model, RMS_EPS);
        Self {
            tok_emb,
            blocks,
            norm_f,
            config: config.clone(),
            checkpointing: false,
            rope: RopeTables::new(config.head_dim(), config.rope_base, quant.kernel != QuantKernel::Reference),
        }
    }

    /// Whether training recomputes each half of a block in backward instead of keeping its activations.
    pub fn set_checkpointing(&mut self, on: bool) {
        self.checkpointing = on;
    }

    /// How far quantization has come in: 0, full precision, to 1, as the configuration says, which it is at first.
    /// In between, the reference computes x + `lambda` (q(x) - x) of each weight and activation x.
    pub fn set_quantization(&mut self, lambda: f64) {
        self.blocks.iter_mut().for_each(|block| block.set_quantization(lambda));
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The quantized layers by PyTorch's names, such as `blocks.0.attn.q_proj`, in the order of the parameters.
    pub fn layers(&self) -> Vec<(String, &BitLinear)> {
        let blocks = self.blocks.iter().enumerate();
        let layers = blocks.flat_map(|(i, block)| block.layers().map(move |layer| (i, layer)));
        layers.map(|(i, (name, layer))| (format!("blocks.{i}.{name}"), layer)).collect()
    }

    /// Logits of the byte that follows each position.
    ///
    /// # Shapes
    /// `tokens`: `[B, T]` int64 below 256 → `[B, T, 256]`, in autocast's dtype where it is on, else fp32.
    pub fn forward(&self, tokens: &Tensor) -> Tensor {
        let mut x = self.embed(tokens);
        let rope = self.rope(0, tokens);
        // Nothing is kept where nothing needs a gradient, so there is nothing to recompute.
        let checkpointing = self.checkpointing && x.requires_grad();
        for block in &self.blocks {
            x = if checkpointing { block.forward_checkpointed(&x, &rope) } else { block.forward(&x, &rope, None) };
        }
        self.head(&x)
    }

    /// [`BitByteLM::forward`] on tokens that follow those in `cache`, which it extends. For inference.
    pub fn forward_cached(&self, tokens: &Tensor, cache: &mut KvCache) -> Tensor {
        let mut x = self.embed(tokens);
        let rope = self.rope(cache.len(), tokens);
        for (block, layer) in self.blocks.iter().zip(&mut cache.layers) {
            x = block.forward(&x, &rope, Some(layer));
        }
        self.head(&x)
    }

    /// A cache that holds no token yet.
    pub fn new_cache(&self) -> KvCache {
        KvCache { layers: self.blocks.iter().map(|_| LayerCache::default()).collect() }
    }

    /// Quantizes all weights of the linear layers for good, for inference, and lets go of the trained ones
    /// ([`BitLinear::freeze`]). Whoever holds the `VarStore` holds those still.
    pub fn freeze(&mut self) {
        self.blocks.iter_mut().for_each(Block::freeze);
    }

    fn embed(&self, tokens: &Tensor) -> Tensor {
        Tensor::embedding(&self.tok_emb, tokens, -1, false, false)
    }

    fn rope(&self, start: i64, tokens: &Tensor) -> Rope {
        self.rope.get(start, tokens.size()[1], tokens.device())
    }

    fn head(&self, x: &Tensor) -> Tensor {
        self.norm_f.forward(x).linear(&self.tok_emb, None::<&Tensor>)
    }
}

impl KvCache {
    /// Number of tokens held.
    pub fn len(&self) -> i64 {
        self.layers.first().map_or(0, LayerCache::len)
    }

    /// Whether nothing is held.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind};

    fn tiny(n_kv_head: Option<i64>, attention: crate::config::Attention) -> (nn::VarStore, BitByteLM) {
        tch::manual_seed(7);
        let config =
            ModelConfig { n_layer: 2, d_model: 32, n_head: 4, n_kv_head, d_ff: 48, attention, ..Default::default() };
        let vs = nn::VarStore::new(Device::Cpu);
        let model = BitByteLM::new(&vs.root(), &config, &QuantConfig::default());
        assert_eq!(vs.trainable_variables().iter().map(|p| p.numel() as i64).sum::<i64>(), config.parameters());
        (vs, model)
    }

    fn tokens(b: i64, t: i64) -> Tensor {
        Tensor::randint(256, [b, t], (Kind::Int64, Device::Cpu))
    }

    fn difference(a: &Tensor, b: &Tensor) -> f64 {
        (a - b).abs().max().double_value(&[])
    }

    #[test]
    fn initial_values_have_the_originals_distribution() {
        let config = ModelConfig { n_layer: 1, d_model: 256, n_head: 4, d_ff: 512, ..Default::default() };
        let vs = nn::VarStore::new(Device::Cpu);
        BitByteLM::new(&vs.root(), &config, &QuantConfig::default());
        let variables = vs.variables();
        let deviation = variables["tok_emb.weight"].std(true).double_value(&[]);
        assert!((deviation * 16.0 - 1.0).abs() < 0.02, "{deviation}");
        let down = &variables["blocks.0.mlp.down.weight"];
        let bound = 1.0 / 512f64.sqrt();
        let largest = down.abs().max().double_value(&[]);
        assert!(largest <= bound && largest > 0.99 * bound, "{largest}");
        assert!((down.std(true).double_value(&[]) / (bound / 3f64.sqrt()) - 1.0).abs() < 0.02);
    }

    #[test]
    fn all_attention_kernels_agree_with_and_without_grouped_heads() {
        use crate::config::Attention;
        for kv in [None, Some(2), Some(1)] {
            let (vs, math) = tiny(kv, Attention::Math);
            let x = tokens(2, 9);
            for attention in [Attention::Auto, Attention::Sdpa] {
                let (mut other_vs, other) = tiny(kv, attention);
                // Not by the seed: other tests of this process draw from the same generator.
                other_vs.copy(&vs).unwrap();
                let _guard = tch::no_grad_guard();
                assert!(difference(&other.forward(&x), &math.forward(&x)) < 1e-2, "{kv:?} {attention:?}");
            }
        }
    }

    #[test]
    fn cached_tokens_give_the_logits_of_the_whole_sequence() {
        for attention in
            [crate::config::Attention::Auto, crate::config::Attention::Sdpa, crate::config::Attention::Math]
        {
            let (_vs, mut model) = tiny(Some(2), attention);
            let x = tokens(1, 12);
            let _guard = tch::no_grad_guard();
            let whole = model.forward(&x);
            model.freeze();
            assert!(difference(&model.forward(&x), &whole) < 1e-3);
            let mut cache = model.new_cache();
            // A prompt, a run of several tokens after it, then single ones.
            let mut parts = vec![];
            for (start, len) in [(0, 4), (4, 3), (7, 1), (8, 1), (9, 3)] {
                parts.push(model.forward_cached(&x.narrow(1, start, len), &mut cache));
            }
            assert_eq!(cache.len(), 12);
            assert!(difference(&Tensor::cat(&parts, 1), &whole) < 1e-2);
        }
    }

    #[test]
    fn without_quantization_it_is_a_model_in_full_precision() {
        let (vs, mut model) = tiny(Some(2), crate::config::Attention::Auto);
        let full = QuantConfig {
            weight: crate::config::WeightQuant::None,
            act: crate::config::ActQuant::None,
            ..QuantConfig::default()
        };
        let mut full_vs = nn::VarStore::new(Device::Cpu);
        let full = BitByteLM::new(&full_vs.root(), model.config(), &full);
        full_vs.copy(&vs).unwrap();
        let x = tokens(2, 9);
        let _guard = tch::no_grad_guard();
        let (expected, quantized) = (full.forward(&x), model.forward(&x));
        model.set_quantization(0.0);
        assert!(model.forward(&x).equal(&expected));
        model.set_quantization(0.5);
        let half = model.forward(&x);
        assert!(difference(&half, &expected) > 1e-3 && difference(&half, &quantized) > 1e-3);
        model.set_quantization(1.0);
        assert!(model.forward(&x).equal(&quantized));
    }

    #[test]
    fn the_future_is_not_seen() {
        let (_vs, model) = tiny(None, crate::config::Attention::Auto);
        let x = tokens(1, 10);
        let y = x.copy();
        let _ = y.narrow(1, 6, 4).fill_(0);
        let _guard = tch::no_grad_guard();
        let (a, b) = (model.forward(&x), model.forward(&y));
        assert!(difference(&a.narrow(1, 0, 6), &b.narrow(1, 0, 6)) < 1e-6);
    }

    #[test]
    fn checkpointing_changes_no_gradient() {
        use crate::config::Attention;
        for (attention, lambda) in [(Attention::Auto, 1.0), (Attention::Sdpa, 1.0), (Attention::Auto, 0.4)] {
            let (vs, mut model) = tiny(None, attention);
            model.set_quantization(lambda);
            let x = tokens(2, 8);
            let mut gradients = |checkpointing: bool| {
                model.set_checkpointing(checkpointing);
                vs.trainable_variables().iter_mut().for_each(Tensor::zero_grad);
                let loss = model.forward(&x).logsumexp([-1], false).sum(Kind::Float);
                // What is recomputed is what was computed, whatever has become of the model since.
                model.set_quantization(1.0);
                loss.backward();
                model.set_quantization(lambda);
                vs.trainable_variables().iter().map(|p| p.grad().copy()).collect::<Vec<_>>()
            };
            for (plain, checkpointed) in gradients(false).iter().zip(gradients(true)) {
                assert!(plain.equal(&checkpointed), "{attention:?} {lambda}");
            }
        }
    }
}

//! `BitLinear`: a linear layer over quantized weights and activations.
//!
//! y = act_quant(x) · ternary_quant(W)ᵀ + b, both with straight-through gradients
//! (BitNet b1.58, arXiv 2402.17764). The quantizers compute in fp32 under any autocast dtype.
//!
//! There are two implementations. The reference is detach arithmetic, and its product runs in what autocast says. The
//! fused one multiplies the integers exactly and rounds the result to what autocast says; its backward products run in
//! that dtype. Which one computes a layer follows from its configuration alone, never from the machine or from a clock:
//! the two round differently, so a run that is resumed, its ranks, and the recomputation of a forward must all take the
//! same one.

use std::sync::{Arc, Mutex, PoisonError};

use tch::{Device, Kind, Tensor, nn};

use super::act_quant::row_absmax;
use super::{Input, TernaryQuantSTE, act_quant, act_quant_per_token, act_quant_through_scale, ternary_quant};
use crate::config::{ActQuant, ActSte, QuantConfig, Ste, WeightQuant};
use crate::kernels::{self, Prologue, TernaryWeight};
use crate::libtorch::{self, or_panic};

/// A linear layer over quantized weights and activations.
#[derive(Debug)]
pub struct BitLinear {
    weight: Weight,
    /// Optional bias, `[out]` fp32, full precision.
    pub bias: Option<Tensor>,
    quant: QuantConfig,
    /// How far quantization has come in, 0 to 1.
    lambda: f64,
    ternary: Arc<TernaryCache>,
    probe: Arc<Mutex<Probe>>,
}

/// The one form in which a layer holds its weight.
#[derive(Debug)]
enum Weight {
    /// As it is trained: `[out, in]` fp32, never quantized in place.
    Trained(Tensor),
    /// Of a frozen layer that the fused kernels compute: what they read.
    Packed(TernaryWeight),
    /// Of a frozen layer that the reference computes: the quantized values, `[out, in]` fp32.
    Quantized(Tensor),
}

/// What is kept of a layer's input for a look inside.
#[derive(Debug, Default)]
enum Probe {
    #[default]
    Off,
    /// What the last forward found, `[N]` fp32.
    On(Option<Tensor>),
}

/// The weight as the fused kernels take it, quantized once for all microbatches and recomputations of a step: it is
/// kept until the weight is written to, or moved.
#[derive(Debug, Default)]
struct TernaryCache(Mutex<Option<(Version, TernaryWeight)>>);

/// How often a weight was written to, and where it lies.
type Version = (i64, usize);

impl TernaryCache {
    fn get(&self, weight: &Tensor) -> TernaryWeight {
        let version = (or_panic(libtorch::tensor_version(weight)), weight.data_ptr() as usize);
        let mut cached = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match &*cached {
            Some((of, ternary)) if *of == version => ternary.shallow_clone(),
            _ => {
                let ternary = or_panic(TernaryWeight::new(weight));
                *cached = Some((version, ternary.shallow_clone()));
                ternary
            }
        }
    }
}

impl BitLinear {
    /// Adds `weight` (and `bias`) to `vs`, Kaiming-uniform with a = sqrt(5) as `torch.nn.Linear`:
    /// both uniform within ±1 / sqrt(in).
    pub fn new(vs: nn::Path, in_dim: i64, out_dim: i64, bias: bool, quant: &QuantConfig) -> Self {
        let bound = 1.0 / (in_dim as f64).sqrt();
        let init = nn::Init::Uniform { lo: -bound, up: bound };
        Self {
            weight: Weight::Trained(libtorch::drawing_alone(|| vs.var("weight", &[out_dim, in_dim], init))),
            bias: bias.then(|| libtorch::drawing_alone(|| vs.var("bias", &[out_dim], init))),
            quant: *quant,
            lambda: 1.0,
            ternary: Arc::default(),
            probe: Arc::default(),
        }
    }

    /// The weight as it is trained, `[out, in]` fp32. None once the layer is frozen.
    pub fn weight(&self) -> Option<&Tensor> {
        match &self.weight {
            Weight::Trained(weight) => Some(weight),
            Weight::Packed(_) | Weight::Quantized(_) => None,
        }
    }

    /// # Shapes
    /// `x`: `[..., in]` → `[..., out]`, in autocast's dtype where it is on, else fp32.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        let [y] = Self::forward_each([self], Input::Plain(x));
        y
    }

    /// Several layers over one input, `[..., in]` each → `[..., out]`.
    pub fn forward_each<const N: usize>(layers: [&Self; N], input: Input) -> [Tensor; N] {
        match layers.iter().all(|layer| layer.is_fused(input.tensor().device())) {
            true => Self::fused(layers, input),
            false => Self::by_reference(layers, input),
        }
    }

    fn by_reference<const N: usize>(layers: [&Self; N], input: Input) -> [Tensor; N] {
        let x = input.reference();
        if layers.iter().any(|layer| layer.is_probed()) {
            let absmax = row_absmax(&x.detach().to_kind(Kind::Float)).view([-1]);
            layers.iter().for_each(|layer| layer.note(&absmax));
        }
        layers.map(|layer| layer.reference(&x))
    }

    fn fused<const N: usize>(layers: [&Self; N], input: Input) -> [Tensor; N] {
        let (x, prologue) = match input {
            Input::Plain(x) => (x, Prologue::None),
            Input::RmsNorm { x, weight, eps } => (x, Prologue::RmsNorm { weight, eps }),
            Input::SwiGlu(gate_up) => (gate_up, Prologue::SwiGlu),
        };
        let ternary = layers.map(|layer| match &layer.weight {
            Weight::Trained(weight) => layer.ternary.get(weight),
            Weight::Packed(ternary) => ternary.shallow_clone(),
            Weight::Quantized(_) => unreachable!("the reference computes a layer that holds quantized values"),
        });
        let weights: [_; N] = std::array::from_fn(|i| (layers[i].weight(), &ternary[i]));
        let clipped = layers.iter().all(|layer| layer.quant.ste == Ste::Clipped);
        let computed = kernels::bit_linear(x, prologue, &weights, clipped, output_kind(x));
        let (outputs, scales) = or_panic(computed);
        if layers.iter().any(|layer| layer.is_probed()) {
            let absmax = scales * 127.0;
            layers.iter().for_each(|layer| layer.note(&absmax));
        }
        let mut outputs = outputs.into_iter();
        std::array::from_fn(|_| outputs.next().expect("an output for each weight"))
    }

    /// Whether the fused kernels compute this layer on `device`.
    fn is_fused(&self, device: Device) -> bool {
        match &self.weight {
            Weight::Trained(_) => {
                let fits = self.quant.may_fuse() && self.lambda == 1.0 && self.bias.is_none();
                fits && matches!(device, Device::Cpu | Device::Cuda(_))
            }
            Weight::Packed(_) => true,
            Weight::Quantized(_) => false,
        }
    }

    /// From here to [`BitLinear::take_input_absmax`], the last forward of this layer, and of other handles to it, keeps
    /// the largest absolute value of each row of its input.
    pub fn probe_input(&self) {
        *self.probe.lock().unwrap_or_else(PoisonError::into_inner) = Probe::On(None);
    }

    /// Ends what [`BitLinear::probe_input`] began: `[N]` fp32 for the N tokens of the last forward since, as they were
    /// quantized, after norm or gate, at least 1e-8. None where there was no forward.
    pub fn take_input_absmax(&self) -> Option<Tensor> {
        match std::mem::take(&mut *self.probe.lock().unwrap_or_else(PoisonError::into_inner)) {
            Probe::Off => None,
            Probe::On(absmax) => absmax,
        }
    }

    fn is_probed(&self) -> bool {
        matches!(*self.probe.lock().unwrap_or_else(PoisonError::into_inner), Probe::On(_))
    }

    fn note(&self, absmax: &Tensor) {
        if let Probe::On(noted) = &mut *self.probe.lock().unwrap_or_else(PoisonError::into_inner) {
            *noted = Some(absmax.shallow_clone());
        }
    }

    /// The weight in its three values as forward multiplies with it now: codes of -1, 0 and 1, `[out, in]` int8, and
    /// gamma, `[]` fp32. None where weights are in full precision, or the layer is frozen.
    pub fn ternary(&self) -> Option<(Tensor, Tensor)> {
        if self.quant.weight == WeightQuant::None {
            return None;
        }
        let weight = self.weight()?;
        if self.is_fused(weight.device()) {
            // Of the last forward, which has cached it.
            let ternary = self.ternary.get(weight);
            return Some((ternary.codes()?.shallow_clone(), ternary.gamma().shallow_clone()));
        }
        let (values, gamma) = ternary_quant(weight);
        Some(((values / &gamma).round().to_kind(Kind::Int8), gamma))
    }

    fn reference(&self, x: &Tensor) -> Tensor {
        let (weight, act_quantizer): (_, fn(&Tensor) -> Tensor) = match &self.weight {
            Weight::Quantized(weight) => (weight.shallow_clone(), |x| act_quant(&x.to_kind(Kind::Float))),
            Weight::Packed(_) => unreachable!("the fused kernels compute a layer that is packed"),
            Weight::Trained(weight) => {
                let weight = match self.quant.weight {
                    WeightQuant::Ternary => {
                        toward(weight, |w| TernaryQuantSTE { ste: self.quant.ste }.forward(w), self.lambda)
                    }
                    WeightQuant::None => weight.shallow_clone(),
                };
                let with_gradient = match self.quant.act_ste {
                    ActSte::Identity => act_quant_per_token,
                    ActSte::None => act_quant_through_scale,
                };
                (weight, with_gradient)
            }
        };
        let x = match self.quant.act {
            ActQuant::Int8 => toward(x, act_quantizer, self.lambda),
            ActQuant::None => x.shallow_clone(),
        };
        x.linear(&weight, self.bias.as_ref())
    }

    /// Quantizes the weight for good, for inference, and lets go of the trained one: the layer then holds it once, as
    /// what computes the layer reads it. Later changes of the trained weight are not seen, no gradient flows, and how
    /// far quantization has come in stays as it is.
    pub fn freeze(&mut self) {
        let Weight::Trained(weight) = &self.weight else { return };
        let weight = weight.detach();
        self.weight = match self.quant.weight {
            _ if self.is_fused(weight.device()) => {
                Weight::Packed(or_panic(TernaryWeight::new(&weight)).for_inference())
            }
            WeightQuant::Ternary => Weight::Quantized(toward(&weight, |w| ternary_quant(w).0, self.lambda)),
            WeightQuant::None => Weight::Quantized(weight),
        };
        self.ternary = Arc::default();
    }

    /// How far quantization has come in: from 0, full precision, to 1, which it is at first. Below 1 the reference
    /// computes.
    pub fn set_quantization(&mut self, lambda: f64) {
        if self.weight().is_some() {
            self.lambda = lambda;
        }
    }

    /// Another handle to the same tensors.
    pub fn shallow_clone(&self) -> Self {
        Self {
            weight: match &self.weight {
                Weight::Trained(weight) => Weight::Trained(weight.shallow_clone()),
                Weight::Packed(ternary) => Weight::Packed(ternary.shallow_clone()),
                Weight::Quantized(weight) => Weight::Quantized(weight.shallow_clone()),
            },
            bias: self.bias.as_ref().map(Tensor::shallow_clone),
            quant: self.quant,
            lambda: self.lambda,
            ternary: self.ternary.clone(),
            probe: self.probe.clone(),
        }
    }
}

/// A part `lambda` of the way from `x` to `quantized(x)`: the values and the gradients of both, mixed. That is
/// x + λ (q(x) - x).detach() where the estimator passes gradients unchanged; where it clips them, it does so by λ.
fn toward(x: &Tensor, quantized: impl Fn(&Tensor) -> Tensor, lambda: f64) -> Tensor {
    match lambda {
        0.0 => x.shallow_clone(),
        1.0 => quantized(x),
        _ => x.to_kind(Kind::Float).lerp(&quantized(x), lambda),
    }
}

/// The dtype of a layer's output: autocast's where it is on for x's device, else fp32.
fn output_kind(x: &Tensor) -> Kind {
    libtorch::autocast_kind(x.device()).unwrap_or(Kind::Float)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Precision, QuantKernel};
    use crate::utils::device::autocast;
    use tch::{Device, Kind};

    fn layer(vs: &nn::VarStore, name: &str, kernel: QuantKernel) -> BitLinear {
        BitLinear::new(vs.root() / name, 256, 256, false, &QuantConfig { kernel, ..QuantConfig::default() })
    }

    fn weight(layer: &BitLinear) -> Tensor {
        layer.weight().expect("a layer that is not frozen").shallow_clone()
    }

    /// What computes a layer decides how it rounds: it may not depend on the shape's time, on whether there is a
    /// backward, or on chance. Each of these was timed once, and could come out either way.
    #[test]
    fn what_computes_a_layer_follows_from_its_configuration() {
        let vs = nn::VarStore::new(Device::Cpu);
        for (kernel, lambda, fused) in [
            (QuantKernel::Auto, 1.0, true),
            (QuantKernel::Fused, 1.0, true),
            (QuantKernel::Reference, 1.0, false),
            (QuantKernel::Auto, 0.5, false),
            (QuantKernel::Fused, 0.5, false),
        ] {
            let mut layer = layer(&vs, &format!("{kernel:?}-{}", lambda * 2.0), kernel);
            layer.set_quantization(lambda);
            // 2^25 multiplications, and few.
            for tokens in [512, 1] {
                let x = Tensor::randn([tokens, 256], (Kind::Float, Device::Cpu)).set_requires_grad(true);
                let input = Input::Plain(&x);
                let [expected] = if fused { BitLinear::fused([&layer], input) } else { [layer.reference(&x)] };
                assert!(layer.forward(&x).equal(&expected), "{kernel:?} {lambda} {tokens}");
                assert!(
                    tch::no_grad(|| layer.forward(&x)).equal(&expected),
                    "{kernel:?} {lambda} {tokens}, no gradient"
                );
            }
        }
    }

    #[test]
    fn a_frozen_layer_computes_the_same_and_holds_its_weight_once() {
        for (kernel, ste, lambda) in [
            (QuantKernel::Auto, Ste::Clipped, 1.0),
            (QuantKernel::Reference, Ste::Identity, 1.0),
            (QuantKernel::Auto, Ste::Identity, 0.3),
        ] {
            let vs = nn::VarStore::new(Device::Cpu);
            let quant = QuantConfig { kernel, ste, ..QuantConfig::default() };
            let mut layer = BitLinear::new(vs.root(), 96, 48, false, &quant);
            layer.set_quantization(lambda);
            let x = Tensor::randn([7, 96], (Kind::Float, Device::Cpu));
            let expected = tch::no_grad(|| layer.forward(&x));
            let mut trained = weight(&layer);
            let handles = Arc::downgrade(&layer.ternary);
            layer.freeze();
            assert!(layer.weight().is_none() && layer.ternary().is_none() && handles.upgrade().is_none());
            match &layer.weight {
                Weight::Packed(ternary) => assert!(ternary.codes().is_none() && kernel == QuantKernel::Auto),
                Weight::Quantized(_) => assert!(kernel == QuantKernel::Reference || lambda < 1.0),
                Weight::Trained(_) => panic!("not frozen"),
            }
            // Neither what becomes of the weight nor of the schedule is seen any more.
            let _ = tch::no_grad(|| trained.zero_());
            layer.set_quantization(0.0);
            let y = layer.shallow_clone().forward(&x);
            assert!(!y.requires_grad());
            let difference = (&y - &expected).abs().max().double_value(&[]);
            assert!(difference < 1e-6 * expected.abs().max().double_value(&[]), "{kernel:?} {lambda}: {difference}");
        }
    }

    #[test]
    fn a_frozen_layer_refuses_a_gradient() {
        let vs = nn::VarStore::new(Device::Cpu);
        let mut layer = layer(&vs, "a", QuantKernel::Auto);
        layer.freeze();
        let x = Tensor::randn([2, 256], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| layer.forward(&x))).is_err());
    }

    #[test]
    fn a_changed_weight_is_quantized_anew() {
        let vs = nn::VarStore::new(Device::Cpu);
        let [fused, reference] =
            [("a", QuantKernel::Fused), ("b", QuantKernel::Reference)].map(|(name, kernel)| layer(&vs, name, kernel));
        let x = Tensor::randn([5, 256], (Kind::Float, Device::Cpu));
        for _ in 0..3 {
            tch::no_grad(|| {
                let mut weight = weight(&fused);
                weight.copy_(&Tensor::randn([256, 256], (Kind::Float, Device::Cpu)));
                reference.weight().unwrap().shallow_clone().copy_(&weight);
            });
            // A clone, as activation checkpointing makes them, has the same cache.
            for layer in [&fused, &fused.shallow_clone()] {
                let (y, expected) = (layer.forward(&x), reference.forward(&x));
                assert!((&y - &expected).abs().max().double_value(&[]) < 1e-4 * expected.abs().max().double_value(&[]));
            }
        }
    }

    /// Against x + λ (q(x) - x).detach() of weights and activations, written out.
    #[test]
    fn quantization_comes_in_gradually() {
        for kernel in [QuantKernel::Auto, QuantKernel::Fused, QuantKernel::Reference] {
            for ste in [Ste::Identity, Ste::Clipped] {
                let vs = nn::VarStore::new(Device::Cpu);
                let quant = QuantConfig { kernel, ste, ..QuantConfig::default() };
                let mut layer = BitLinear::new(vs.root(), 96, 48, false, &quant);
                let x = Tensor::randn([7, 96], (Kind::Float, Device::Cpu)).set_requires_grad(true);
                let upstream = Tensor::randn([7, 48], (Kind::Float, Device::Cpu));
                for lambda in [0.0, 0.3, 0.75, 1.0] {
                    let (mut w, mut x) = (weight(&layer), x.shallow_clone());
                    w.zero_grad();
                    x.zero_grad();
                    layer.set_quantization(lambda);
                    let y = layer.forward(&x);
                    (&y * &upstream).sum(Kind::Float).backward();

                    let fp64 = |t: &Tensor| t.detach().to_kind(Kind::Double);
                    let mix = |x: &Tensor, q: &Tensor| fp64(x) + (fp64(q) - fp64(x)) * lambda;
                    let (wq, gamma) = ternary_quant(&w);
                    let (wl, xl) = (mix(&w, &wq), mix(&x, &act_quant(&x)));
                    let mut gradient = fp64(&upstream).transpose(0, 1).matmul(&xl);
                    if ste == Ste::Clipped {
                        let outside = w.detach().abs().gt_tensor(&gamma).to_kind(Kind::Double);
                        gradient *= outside * -lambda + 1.0;
                    }
                    let near = |actual: &Tensor, expected: &Tensor, what: &str| {
                        let difference = (fp64(actual) - expected).abs().max().double_value(&[]);
                        let scale = expected.abs().max().double_value(&[]);
                        assert!(
                            difference < 1e-6 * scale,
                            "{what} {kernel:?} {ste:?} {lambda}: {difference} of {scale}"
                        );
                    };
                    near(&y, &xl.matmul(&wl.transpose(0, 1)), "y");
                    near(&w.grad(), &gradient, "w's gradient");
                    near(&x.grad(), &fp64(&upstream).matmul(&wl), "x's gradient");

                    let mut frozen = layer.shallow_clone();
                    frozen.freeze();
                    near(&tch::no_grad(|| frozen.forward(&x)), &fp64(&y), "frozen");
                }
            }
        }
    }

    #[test]
    fn quantizers_compute_in_fp32_under_any_autocast_dtype() {
        tch::manual_seed(6);
        let vs = nn::VarStore::new(Device::Cpu);
        let layer = BitLinear::new(vs.root(), 64, 32, false, &QuantConfig::default());
        let x = Tensor::randn([8, 64], (Kind::Float, Device::Cpu));
        let expected = layer.forward(&x).detach();
        for (precision, kind) in [(Precision::Bf16, Kind::BFloat16), (Precision::Fp16, Kind::Half)] {
            let y = autocast(Device::Cpu, precision, || layer.forward(&x)).unwrap();
            assert_eq!(y.kind(), kind);
            // What a product of rounded operands is off by: a wrong code, as of a quantizer in bf16, would be
            // off by much more in some element.
            let difference = (y.to_kind(Kind::Float) - &expected).abs().max() / expected.abs().max();
            assert!(difference.double_value(&[]) < 1e-2, "{precision:?}: {difference}");
            y.to_kind(Kind::Float).sum(Kind::Float).backward();
            assert_eq!(weight(&layer).grad().kind(), Kind::Float);
        }
    }
}

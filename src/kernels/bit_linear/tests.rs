use super::*;
use crate::kernels::cpu_features::tests::{runnable as kernels, subsets};
use crate::kernels::testing::{self, KINDS, error, integers, leaf, randn, tolerance};
use crate::libtorch::{Autocast, AutocastDtype, recompute_in_backward, tensor_version};
use crate::quantization::{TernaryQuantSTE, act_quant, ternary_quant};
use tch::Device;

/// The outputs of weights that get gradients.
fn outputs(
    kernels: CpuFeatures,
    x: &Tensor,
    prologue: Prologue,
    weights: &[(&Tensor, &TernaryWeight)],
    clipped: bool,
    kind: Kind,
) -> Result<Vec<Tensor>, Error> {
    let weights: Vec<_> = weights.iter().map(|&(weight, ternary)| (Some(weight), ternary)).collect();
    Ok(bit_linear_with(kernels, x, prologue, &weights, clipped, kind)?.0)
}

fn codes(ternary: &TernaryWeight) -> Tensor {
    ternary.codes().expect("codes").to_kind(Kind::Float)
}

/// The quantized `x`, `[N, D]`, by a product with the identity: each output is a code times its scale.
fn quantized(kernels: CpuFeatures, x: &Tensor) -> Tensor {
    let eye = Tensor::eye(x.size()[1], (Kind::Float, Device::Cpu));
    // gamma is 1 / D, and the codes are those of the identity.
    let ternary = TernaryWeight::with(kernels, &eye).unwrap();
    assert!(codes(&ternary).equal(&eye));
    let ternary = TernaryWeight { gamma: ternary.gamma.ones_like(), ..ternary };
    outputs(kernels, x, Prologue::None, &[(&eye, &ternary)], false, Kind::Float).unwrap().remove(0)
}

#[test]
fn activations_are_those_of_the_reference_exactly() {
    testing::seed();
    for kernels in kernels() {
        for (n, d) in [(0, 8), (1, 1), (1, 7), (3, 16), (5, 33), (50, 100), (97, 384)] {
            for kind in KINDS {
                let x = (randn(&[n, d]) * randn(&[n, 1]).exp()).to_kind(kind);
                if n > 2 {
                    let _ = x.get(1).zero_();
                    let _ = x.get(2).fill_(1e-9);
                }
                let expected = act_quant(&x.to_kind(Kind::Float));
                assert!(quantized(kernels, &x).equal(&expected), "{kernels:?} [{n}, {d}] {kind:?}");
            }
        }
    }
}

#[test]
fn ties_go_to_even() {
    testing::seed();
    // The scale is exactly 1.
    let x = Tensor::from_slice(&[127.0f32, 0.5, 1.5, 2.5, -0.5, -1.5, 125.5, 126.5]).view([1, 8]);
    let expected = Tensor::from_slice(&[127.0f32, 0.0, 2.0, 2.0, 0.0, -2.0, 126.0, 126.0]).view([1, 8]);
    for kernels in kernels() {
        assert!(quantized(kernels, &x).equal(&expected), "{kernels:?}");
    }
}

#[test]
fn weights_are_those_of_the_reference() {
    testing::seed();
    for kernels in kernels() {
        for (out, inner) in [(1, 1), (3, 5), (64, 64), (130, 77), (300, 384)] {
            let w = randn(&[out, inner]) * 0.02;
            let ternary = TernaryWeight::with(kernels, &w).unwrap();
            let gamma = w.to_kind(Kind::Double).abs().mean(Kind::Double).to_kind(Kind::Float);
            assert!(error(&ternary.gamma, &gamma) <= f64::from(f32::EPSILON), "{kernels:?}");
            let codes = (&w / &ternary.gamma).clamp(-1, 1).round();
            assert!(self::codes(&ternary).equal(&codes), "{kernels:?} [{out}, {inner}]");
            // Where the reference's sum is another in its last bit, an element at a threshold may differ.
            let differing = (ternary_quant(&w).0.sign() - codes).abs().sum(Kind::Float).double_value(&[]);
            assert!(differing <= 2.0);
        }
        let zeros = TernaryWeight::with(kernels, &randn(&[4, 4]).zero_()).unwrap();
        assert!(codes(&zeros).abs().max().double_value(&[]) == 0.0 && zeros.gamma.double_value(&[]) == 1e-8f32 as f64);
    }
}

/// That the product of codes `x`, each row of which has a 127, with weights `w` of -1, 0 and 1 is exact: the scales and
/// gamma are 1.
fn product_is_exact(kernels: impl IntoIterator<Item = CpuFeatures>, x: &Tensor, w: &Tensor, what: &str) {
    let ones = Tensor::ones([], (Kind::Float, Device::Cpu));
    let expected = x.to_kind(Kind::Int64).matmul(&w.to_kind(Kind::Int64).tr());
    for kernels in kernels {
        let ternary = TernaryWeight::with(kernels, &(w * 0.5)).unwrap();
        let ternary = TernaryWeight { gamma: ones.copy(), ..ternary };
        if w.abs().mean(Kind::Float).double_value(&[]) > 0.0 {
            assert!(codes(&ternary).equal(w));
        }
        let weights = [(w, &ternary)];
        let y = outputs(kernels, x, Prologue::None, &weights, false, Kind::Float).unwrap().remove(0);
        assert!(y.to_kind(Kind::Int64).equal(&expected), "{kernels:?} {what}");
        for kind in KINDS {
            let rounded = outputs(kernels, x, Prologue::None, &weights, false, kind).unwrap();
            assert!(rounded[0].equal(&y.to_kind(kind)), "{kernels:?} {what} {kind:?}");
        }
    }
}

#[test]
fn products_are_exact_and_the_same_for_any_instruction_set() {
    testing::seed();
    // The largest sums are integers that fp32 holds exactly.
    for (n, inner, out) in [(1, 1, 1), (2, 3, 5), (7, 13, 70), (49, 384, 64), (100, 1023, 129), (5, 4096, 17)] {
        let x = (randn(&[n, inner]) * 80.0).round().clamp(-127, 127);
        let _ = x.narrow(1, 0, 1).fill_(127.0);
        let w = integers(-1, 2, &[out, inner]).to_kind(Kind::Float);
        product_is_exact(kernels(), &x, &w, &format!("{n} {inner} {out}"));
        if n == 7 {
            product_is_exact(subsets(), &x, &w, "every subset of this CPU's features");
        }
    }
}

/// Partial sums of random signs stay far below 2^15. Those of these patterns grow as fast as possible, so that one that
/// is held in 16 bits anywhere would wrap around.
#[test]
fn the_largest_products_do_not_overflow() {
    for inner in [128, 192, 256, 384, 512, 1000, 1024, 2048, 4096] {
        // 1 or -1 along a row: all the same, changing at each element, at every second, in the middle.
        let signs = |change: &dyn Fn(i64) -> bool| -> Tensor {
            let signs: Vec<f32> = (0..inner).map(|i| if change(i) { -1.0 } else { 1.0 }).collect();
            Tensor::from_slice(&signs)
        };
        let patterns: [Tensor; 5] = [
            signs(&|_| false),
            signs(&|_| true),
            signs(&|i| i % 2 == 1),
            signs(&|i| i / 2 % 2 == 1),
            signs(&|i| i >= inner / 2),
        ];
        let all = Tensor::stack(&patterns, 0);
        // Each pattern of activations meets each of weights, its equal and its opposite among them.
        product_is_exact(kernels(), &(&all * 127.0), &all, &format!("{inner}"));
        // More rows than a tile has.
        product_is_exact(
            kernels(),
            &(&all * 127.0).repeat([9, 1]),
            &all.repeat([30, 1]),
            &format!("{inner}, repeated"),
        );
    }
}

/// The kinds of prologue.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Before {
    Nothing,
    Norm,
    Gate,
}

/// A layer's input, weights, and the gradients of its outputs.
struct Layer {
    before: Before,
    x: Tensor,
    norm: Tensor,
    weights: Vec<Tensor>,
    dys: Vec<Tensor>,
    clipped: bool,
}

impl Layer {
    fn random(before: Before, size: &[i64], inner: i64, outs: &[i64], clipped: bool) -> Self {
        let width = if before == Before::Gate { 2 * inner } else { inner };
        let with = |last| [size, &[last]].concat();
        Self {
            before,
            x: randn(&with(width)),
            norm: randn(&[inner]) * 0.2 + 1.0,
            weights: outs.iter().map(|&out| randn(&[out, inner]) * 0.05).collect(),
            dys: outs.iter().map(|&out| randn(&with(out))).collect(),
            clipped,
        }
    }

    /// Outputs and the gradients of x, the norm's weight and the weights, under `f(x, norm, weights)`.
    fn run(&self, kind: Kind, f: impl Fn(&Tensor, &Tensor, &[Tensor]) -> Vec<Tensor>) -> Vec<Tensor> {
        let (x, norm) = (leaf(&self.x.to_kind(kind)), leaf(&self.norm));
        let weights: Vec<_> = self.weights.iter().map(leaf).collect();
        let ys = f(&x, &norm, &weights);
        let sum: Tensor = ys.iter().zip(&self.dys).map(|(y, dy)| (y * dy.to_kind(y.kind())).sum(Kind::Double)).sum();
        sum.backward();
        let mut results: Vec<_> = ys.iter().map(Tensor::detach).collect();
        results.push(x.grad());
        if self.before == Before::Norm {
            results.push(norm.grad());
        }
        results.extend(weights.iter().map(Tensor::grad));
        results
    }

    fn fused(&self, kernels: CpuFeatures, x_kind: Kind, kind: Kind) -> Vec<Tensor> {
        self.run(x_kind, |x, norm, weights| self.forward(kernels, x, norm, weights, kind))
    }

    fn forward(&self, kernels: CpuFeatures, x: &Tensor, norm: &Tensor, weights: &[Tensor], kind: Kind) -> Vec<Tensor> {
        let ternary: Vec<_> = weights.iter().map(|w| TernaryWeight::with(kernels, w).unwrap()).collect();
        let pairs: Vec<_> = weights.iter().zip(&ternary).collect();
        let prologue = match self.before {
            Before::Nothing => Prologue::None,
            Before::Norm => Prologue::RmsNorm { weight: norm, eps: 1e-6 },
            Before::Gate => Prologue::SwiGlu,
        };
        outputs(kernels, x, prologue, &pairs, self.clipped, kind).unwrap()
    }

    /// What is quantized, by libtorch's operators in fp32.
    fn reference(&self, kind: Kind) -> Tensor {
        let x = self.x.to_kind(kind).to_kind(Kind::Float);
        match self.before {
            Before::Nothing => x,
            Before::Norm => x.rms_norm(self.norm.size(), Some(&self.norm), 1e-6),
            Before::Gate => {
                let halves = x.chunk(2, -1);
                halves[0].silu() * &halves[1]
            }
        }
    }

    /// The activations as they are multiplied: what the layer gives for the identity.
    fn quantized(&self, kernels: CpuFeatures, kind: Kind) -> Tensor {
        let inner = self.norm.size()[0];
        let layer = Layer { weights: vec![Tensor::eye(inner, (Kind::Float, Device::Cpu)) * inner], ..self.copy() };
        // gamma is 1: in the product of one code with its scale nothing is rounded but that.
        layer.forward(kernels, &layer.x.to_kind(kind), &layer.norm, &layer.weights, Kind::Float).remove(0)
    }

    fn copy(&self) -> Self {
        let copies = |tensors: &[Tensor]| tensors.iter().map(Tensor::copy).collect();
        let (weights, dys) = (copies(&self.weights), copies(&self.dys));
        Self { x: self.x.copy(), norm: self.norm.copy(), weights, dys, ..*self }
    }

    /// By detach arithmetic in fp64, of x as `kind` has it. `quantized`: the activations, checked here to be the
    /// nearest there are; at the edge of two codes rounding decides.
    fn exact(&self, kind: Kind, quantized: &Tensor) -> Vec<Tensor> {
        let layer = Layer { x: self.x.to_kind(kind), ..self.copy() };
        let quantized = quantized.to_kind(Kind::Double);
        layer.run(Kind::Double, |x, norm, weights| {
            let h = match self.before {
                Before::Nothing => x.shallow_clone(),
                Before::Norm => {
                    let rstd = (x.square().mean_dim([-1].as_slice(), true, Kind::Double) + 1e-6).rsqrt();
                    x * rstd * norm.to_kind(Kind::Double)
                }
                Before::Gate => {
                    let halves = x.chunk(2, -1);
                    halves[0].silu() * &halves[1]
                }
            };
            if h.numel() > 0 && h.isfinite().all().int64_value(&[]) == 1 {
                let scale = h.abs().amax([-1], true) / 127.0;
                let steps = ((&quantized - &h).abs() / scale).max().double_value(&[]);
                assert!(steps < 0.5 + 1e-3, "{steps}");
            }
            let h = &h + (&quantized - &h).detach();
            let ste = if self.clipped { crate::config::Ste::Clipped } else { crate::config::Ste::Identity };
            let linear =
                |w: &Tensor| h.linear(&TernaryQuantSTE { ste }.forward(w).to_kind(Kind::Double), None::<&Tensor>);
            weights.iter().map(linear).collect()
        })
    }
}

fn layers() -> Vec<Layer> {
    let mut layers = Vec::new();
    for before in [Before::Nothing, Before::Norm, Before::Gate] {
        for clipped in [false, true] {
            layers.push(Layer::random(before, &[4, 40], 96, &[64, 70, 33], clipped));
            layers.push(Layer::random(before, &[1], 7, &[5], clipped));
            layers.push(Layer::random(before, &[3, 0], 8, &[4, 4], clipped));
            layers.push(Layer::random(before, &[130], 33, &[129], clipped));
        }
    }
    layers
}

#[test]
fn outputs_and_gradients_are_those_of_the_formula() {
    testing::seed();
    for layer in layers() {
        for (x_kind, kind) in [(Kind::Float, Kind::Float), (Kind::Float, Kind::BFloat16), (Kind::Float, Kind::Half)]
            .into_iter()
            .chain([(Kind::BFloat16, Kind::BFloat16), (Kind::Half, Kind::Half)])
        {
            for kernels in kernels() {
                let expected = layer.exact(x_kind, &layer.quantized(kernels, x_kind));
                let actual = layer.fused(kernels, x_kind, kind);
                assert_eq!(actual.len(), expected.len());
                for (i, (actual, expected)) in actual.iter().zip(&expected).enumerate() {
                    let weights = layer.weights.len();
                    let kind_of = if i < weights {
                        kind
                    } else if i == weights {
                        x_kind
                    } else {
                        Kind::Float
                    };
                    assert_eq!(actual.kind(), kind_of);
                    let error = error(actual, expected);
                    let what = (layer.before, layer.clipped, layer.x.size(), kernels, x_kind, kind);
                    assert!(error < tolerance(kind), "{what:?}, result {i}: {error}");
                }
            }
        }
    }
}

#[test]
fn only_what_is_asked_for_gets_a_gradient() {
    testing::seed();
    let layer = Layer::random(Before::Norm, &[10], 16, &[8, 8], false);
    let (x, norm) = (leaf(&layer.x), layer.norm.detach());
    let weights = [leaf(&layer.weights[0]), layer.weights[1].detach()];
    let ys = layer.forward(CpuFeatures::detected(), &x, &norm, &weights, Kind::Float);
    // The second output goes nowhere.
    (&ys[0] * &layer.dys[0]).sum(Kind::Float).backward();
    let alone = Layer {
        weights: vec![weights[0].detach()],
        dys: vec![layer.dys[0].detach()],
        x: layer.x.copy(),
        norm: norm.copy(),
        ..layer
    };
    let expected = alone.exact(Kind::Float, &alone.quantized(CpuFeatures::detected(), Kind::Float));
    assert!(error(&x.grad(), &expected[1]) < 1e-5 && error(&weights[0].grad(), &expected[3]) < 1e-5);
    assert!(!weights[1].grad().defined() && !norm.grad().defined());
    let without = tch::no_grad(|| layer_output(&alone, &x));
    assert!(!without.requires_grad());
}

fn layer_output(layer: &Layer, x: &Tensor) -> Tensor {
    layer.forward(CpuFeatures::detected(), x, &layer.norm, &layer.weights, Kind::Float).remove(0)
}

#[test]
fn the_gradients_of_several_weights_share_no_memory() {
    testing::seed();
    let layer = Layer::random(Before::Nothing, &[10], 16, &[8, 8], false);
    let results = layer.fused(CpuFeatures::detected(), Kind::Float, Kind::Float);
    let before = results[4].copy();
    let _ = results[3].shallow_clone().resize_([32, 32]).fill_(1.0);
    assert!(results[4].equal(&before));
}

#[test]
fn what_is_not_finite_is_not_hidden() {
    testing::seed();
    for before in [Before::Nothing, Before::Norm, Before::Gate] {
        for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            for kind in KINDS {
                let layer = Layer::random(before, &[5], 40, &[20], false);
                let _ = layer.x.get(3).get(11).fill_(value);
                let reference = act_quant(&layer.reference(kind));
                let expected = reference.linear(&layer.weights[0], None::<&Tensor>).isfinite();
                assert_eq!(expected.all_dim(-1, false).to_kind(Kind::Int64).sum(Kind::Int64).int64_value(&[]), 4);
                for kernels in kernels() {
                    let results = layer.fused(kernels, kind, kind);
                    assert!(results[0].isfinite().equal(&expected), "{kernels:?} {before:?} {value} {kind:?}");
                    assert!(results[0].get(3).isnan().all().int64_value(&[]) == 1);
                    let dweight = results.last().unwrap();
                    assert!(dweight.isfinite().all().int64_value(&[]) == 0, "{kernels:?} {before:?} {value} {kind:?}");
                }
            }
        }
    }
    for kernels in kernels() {
        for value in [f64::NAN, f64::INFINITY] {
            let w = randn(&[6, 9]);
            let _ = w.get(1).get(2).fill_(value);
            let ternary = TernaryWeight::with(kernels, &w).unwrap();
            let x = randn(&[3, 9]);
            let y = outputs(kernels, &x, Prologue::None, &[(&w, &ternary)], false, Kind::Float).unwrap();
            assert!(y[0].isfinite().any().int64_value(&[]) == 0, "{kernels:?} {value}");
        }
    }
}

#[test]
fn the_same_bits_with_any_number_of_threads() {
    testing::seed();
    let threads = tch::get_num_threads();
    for before in [Before::Nothing, Before::Norm, Before::Gate] {
        let mut layer = Layer::random(before, &[3, 301], 200, &[100, 65], true);
        // Small integers and halves: libtorch's product, which is the gradient of the activations, is then exact in any
        // order of summation.
        layer.dys.iter_mut().for_each(|dy| *dy = dy.round());
        layer.weights.iter_mut().for_each(|w| *w = w.sign() * 0.5);
        for kind in [Kind::Float, Kind::BFloat16] {
            let results = [1, 2, 3, 8].map(|n| {
                tch::set_num_threads(n);
                layer.fused(CpuFeatures::detected(), Kind::Float, kind)
            });
            let gradients = if before == Before::Norm { 2 } else { 1 };
            let ours = 0..layer.weights.len() + gradients;
            for other in &results[1..] {
                assert!(ours.clone().all(|i| results[0][i].equal(&other[i])), "{before:?} {kind:?}");
            }
        }
    }
    tch::set_num_threads(threads);
}

#[test]
fn inside_recomputation_and_autocast() {
    testing::seed();
    // The same kernels on both sides: those of another instruction set may sum the norm in another order.
    let kernels = CpuFeatures::chosen().unwrap();
    for kind in [Kind::Float, Kind::BFloat16] {
        let layer = Layer::random(Before::Norm, &[2, 30], 48, &[40], true);
        let plain = layer.fused(kernels, Kind::Float, kind);
        let recomputed = layer.run(Kind::Float, |x, norm, weights| {
            let _region = Autocast::enter(Device::Cpu, AutocastDtype::BFloat16).unwrap();
            let (norm, weight) = (norm.shallow_clone(), weights[0].shallow_clone());
            let ternary = TernaryWeight::new(&weight).unwrap();
            let f = move |x: &Tensor| {
                let prologue = Prologue::RmsNorm { weight: &norm, eps: 1e-6 };
                outputs(kernels, x, prologue, &[(&weight, &ternary)], true, kind).unwrap().remove(0)
            };
            vec![recompute_in_backward(f, x).unwrap()]
        });
        assert!(plain.iter().zip(&recomputed).all(|(a, b)| a.equal(b)), "{kind:?}");
        // Backward inside the region, too.
        let inside = {
            let x = leaf(&layer.x);
            let weights: Vec<_> = layer.weights.iter().map(leaf).collect();
            let y = layer.forward(kernels, &x, &layer.norm, &weights, kind).remove(0);
            let dy = layer.dys[0].to_kind(kind);
            let _region = Autocast::enter(Device::Cpu, AutocastDtype::BFloat16).unwrap();
            (y * dy).sum(Kind::Double).backward();
            [x.grad(), weights[0].grad()]
        };
        assert!(inside[0].equal(&plain[1]) && inside[1].equal(&plain[3]), "{kind:?}");
    }
}

#[test]
fn there_is_no_second_derivative() {
    testing::seed();
    let (x, w) = (leaf(&randn(&[3, 8])), leaf(&randn(&[4, 8])));
    let ternary = TernaryWeight::new(&w).unwrap();
    let y = outputs(CpuFeatures::chosen().unwrap(), &x, Prologue::None, &[(&w, &ternary)], false, Kind::Float)
        .unwrap()
        .remove(0);
    let error = Tensor::f_run_backward(&[y.sum(Kind::Float)], &[&x], true, true).unwrap_err();
    assert!(error.to_string().contains("no second derivative"), "{error}");
}

#[test]
fn a_weight_that_changed_between_forward_and_its_clipped_backward_is_noticed() {
    testing::seed();
    let (x, w) = (randn(&[3, 8]), leaf(&randn(&[4, 8])));
    let ternary = TernaryWeight::new(&w).unwrap();
    let y = outputs(CpuFeatures::chosen().unwrap(), &x, Prologue::None, &[(&w, &ternary)], true, Kind::Float)
        .unwrap()
        .remove(0);
    let before = tensor_version(&w).unwrap();
    tch::no_grad(|| {
        let _ = w.shallow_clone().fill_(1.0);
    });
    assert!(tensor_version(&w).unwrap() > before);
    assert!(Tensor::f_run_backward(&[y.sum(Kind::Float)], &[&w], false, false).is_err());
}

#[test]
fn what_does_not_fit_is_refused() {
    testing::seed();
    let w = randn(&[4, 8]);
    let ternary = TernaryWeight::new(&w).unwrap();
    let weights = [(&w, &ternary)];
    let run = |x: &Tensor, prologue: Prologue, kind| {
        outputs(CpuFeatures::chosen().unwrap(), x, prologue, &weights, false, kind).unwrap_err().to_string()
    };
    assert!(run(&randn(&[2, 7]), Prologue::None, Kind::Float).contains("do not fit"));
    assert!(run(&randn(&[2, 8]), Prologue::SwiGlu, Kind::Float).contains("do not fit"));
    assert!(run(&randn(&[2, 8]), Prologue::None, Kind::Double).contains("Double"));
    let norm = randn(&[7]);
    assert!(run(&randn(&[2, 8]), Prologue::RmsNorm { weight: &norm, eps: 1e-6 }, Kind::Float).contains("norm"));
    assert!(TernaryWeight::new(&randn(&[3])).is_err() && TernaryWeight::new(&w.to_kind(Kind::Double)).is_err());
}

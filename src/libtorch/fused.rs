//! The layers of a BitLinear network in few passes over memory, each with its own backward: the norm or the gate and
//! the quantization in one, the product of the integers, rotary positions, cross-entropy.
//!
//! Kernels are those of the tensors' device. On the CPU, the number of threads does not change a bit of what they
//! compute, but it may of the gradients that are libtorch's own matrix products; the products of integers are exact and
//! the same for any instruction set.

use std::ffi::c_int;
use std::ptr;

use tch::{Kind, Tensor};

use super::cpu_kernels::CpuKernels;
use super::{Error, ffi};

/// A weight quantized to -1, 0 and 1 times gamma = mean|w|, as [`bit_linear`] multiplies with it (BitNet b1.58, arXiv
/// 2402.17764, equations 1–3). It does not follow later changes of the weight.
#[derive(Debug)]
pub struct TernaryWeight {
    /// Its size.
    size: [i64; 2],
    /// `[out, in]` int8. None where only products are wanted, and `packed` is there for them.
    codes: Option<Tensor>,
    /// `[]` fp32
    gamma: Tensor,
    /// The codes once more, in the order that the device's product reads them in.
    packed: Option<Tensor>,
}

impl TernaryWeight {
    /// Quantizes `w`, `[out, in]` fp32. No gradient flows through: it is [`bit_linear`] that knows the weight's.
    ///
    /// # Errors
    /// Another shape or dtype; a device without kernels; a value of `BBT_CPU_KERNELS` that is none.
    pub fn new(w: &Tensor) -> Result<Self, Error> {
        Self::with(CpuKernels::chosen()?, w)
    }

    fn with(kernels: CpuKernels, w: &Tensor) -> Result<Self, Error> {
        if w.kind() != Kind::Float || w.dim() != 2 || w.numel() == 0 {
            return Err(Error::Other(format!("ternary weight: {:?} {:?} is not [out, in] Float", w.kind(), w.size())));
        }
        let [mut codes, mut gamma, mut packed] = [ptr::null_mut(); 3];
        // SAFETY: a live tensor of the dtype and shape that the kernels expect, and room for three pointers to new
        // tensors, which we own; the last may stay null. This CPU runs `kernels`.
        unsafe {
            let isa = kernels;
            ffi::check(ffi::bbt_ternary_weight(isa, w.as_ptr(), &mut codes, &mut gamma, &mut packed))?;
            Ok(Self {
                size: [w.size()[0], w.size()[1]],
                codes: Some(Tensor::from_ptr(codes)),
                gamma: Tensor::from_ptr(gamma),
                packed: (!packed.is_null()).then(|| Tensor::from_ptr(packed)),
            })
        }
    }

    /// Without the codes where products do not read them: half the memory. There is no backward then.
    pub fn for_inference(self) -> Self {
        let codes = if self.packed.is_some() { None } else { self.codes };
        Self { codes, ..self }
    }

    /// -1, 0 and 1: `[out, in]` int8. None after [`TernaryWeight::for_inference`].
    pub fn codes(&self) -> Option<&Tensor> {
        self.codes.as_ref()
    }

    /// mean|w|, at least 1e-8: `[]` fp32.
    pub fn gamma(&self) -> &Tensor {
        &self.gamma
    }

    /// Another handle to the same tensors.
    pub fn shallow_clone(&self) -> Self {
        Self {
            size: self.size,
            codes: self.codes.as_ref().map(Tensor::shallow_clone),
            gamma: self.gamma.shallow_clone(),
            packed: self.packed.as_ref().map(Tensor::shallow_clone),
        }
    }
}

/// What [`bit_linear`] computes of its input before quantizing.
#[derive(Debug, Clone, Copy)]
pub enum Prologue<'a> {
    /// Nothing.
    None,
    /// x / sqrt(mean(x²) + eps) · weight over the last dimension (Zhang & Sennrich 2019, arXiv 1910.07467).
    RmsNorm {
        /// `[in]` fp32
        weight: &'a Tensor,
        /// Added to the mean square.
        eps: f64,
    },
    /// silu(gate) · up, where x holds gate and up, one after the other (Shazeer 2020, arXiv 2002.05202).
    SwiGlu,
}

/// x Wᵀ for several weights W, over activations in int8 with a scale of absmax / 127 per token (BitNet b1.58, arXiv
/// 2402.17764, §2), which are computed once. The integers' product is exact.
///
/// Straight-through: the gradient of the quantized activations is that of what was quantized, the gradient of a weight
/// is that of the quantized one; if `clipped`, it is zero where |w| > gamma. A row in which something is not finite has
/// outputs that are not a number. Differentiable once. Backward's products run in `kind`, on the CPU those of Half in
/// fp32; gradients have the dtypes of what they are the gradients of. Autocast does not reach inside.
///
/// # Shapes
/// `x`: `[..., in]`, before SwiGLU `[..., 2 in]`; `weights`: `[out, in]` fp32 each, the tensor that gets the gradient
/// together with its quantized form. Returns `[..., out]` for each, as `kind`.
///
/// # Dtypes
/// `x` and `kind`: Float, BFloat16 or Half. Norm, gate and quantization are computed in fp32.
///
/// # Errors
/// Other dtypes, shapes or devices; a value of `BBT_CPU_KERNELS` that is none.
pub fn bit_linear(
    x: &Tensor,
    prologue: Prologue,
    weights: &[(&Tensor, &TernaryWeight)],
    clipped: bool,
    kind: Kind,
) -> Result<Vec<Tensor>, Error> {
    bit_linear_with(CpuKernels::chosen()?, x, prologue, weights, clipped, kind)
}

/// [`bit_linear`], and the scales of the activations, which it has anyway: `[N]` fp32 for the N tokens, in order, without
/// a gradient; 127 times a scale is the largest absolute value of its row, at least 1e-8, after the prologue. A weight
/// without the tensor that gets the gradient is for inference.
///
/// # Errors
/// As [`bit_linear`]; a gradient that is wanted of `x` where a weight is for inference.
pub fn bit_linear_and_scales(
    x: &Tensor,
    prologue: Prologue,
    weights: &[(Option<&Tensor>, &TernaryWeight)],
    clipped: bool,
    kind: Kind,
) -> Result<(Vec<Tensor>, Tensor), Error> {
    all_of_bit_linear(CpuKernels::chosen()?, x, prologue, weights, clipped, kind)
}

fn bit_linear_with(
    kernels: CpuKernels,
    x: &Tensor,
    prologue: Prologue,
    weights: &[(&Tensor, &TernaryWeight)],
    clipped: bool,
    kind: Kind,
) -> Result<Vec<Tensor>, Error> {
    let weights: Vec<_> = weights.iter().map(|&(weight, ternary)| (Some(weight), ternary)).collect();
    Ok(all_of_bit_linear(kernels, x, prologue, &weights, clipped, kind)?.0)
}

fn all_of_bit_linear(
    kernels: CpuKernels,
    x: &Tensor,
    prologue: Prologue,
    weights: &[(Option<&Tensor>, &TernaryWeight)],
    clipped: bool,
    kind: Kind,
) -> Result<(Vec<Tensor>, Tensor), Error> {
    check_bit_linear(x, prologue, weights, kind)?;
    let (before, norm_weight, eps) = match prologue {
        Prologue::None => (ffi::Prologue::None, ptr::null(), 0.0),
        Prologue::RmsNorm { weight, eps } => (ffi::Prologue::RmsNorm, weight.as_ptr(), eps),
        Prologue::SwiGlu => (ffi::Prologue::SwiGlu, ptr::null(), 0.0),
    };
    let dtype = match kind {
        Kind::Half => ffi::Dtype::Half,
        Kind::BFloat16 => ffi::Dtype::BFloat16,
        _ => ffi::Dtype::Float,
    };
    let or_null = |tensor: Option<&Tensor>| tensor.map_or(ptr::null(), |tensor| tensor.as_ptr());
    let tensors: Vec<_> = weights
        .iter()
        .flat_map(|(weight, ternary)| {
            let (codes, packed) = (ternary.codes.as_ref(), ternary.packed.as_ref());
            [or_null(*weight), or_null(codes), ternary.gamma.as_ptr(), or_null(packed)]
        })
        .collect();
    let outs: Vec<i64> = weights.iter().map(|(_, ternary)| ternary.size[0]).collect();
    let mut outputs = vec![ptr::null_mut(); weights.len()];
    let mut scales = ptr::null_mut();
    // SAFETY: live tensors of one device, of the dtypes and shapes that the kernels expect, four to a weight, of which
    // some may be null where there is no backward, and a number to each. Room for a pointer to a new tensor each and to one more, which we own. This CPU runs `kernels`.
    unsafe {
        ffi::check(ffi::bbt_bit_linear(
            kernels,
            x.as_ptr(),
            before,
            norm_weight,
            eps,
            tensors.as_ptr(),
            outs.as_ptr(),
            weights.len(),
            c_int::from(clipped),
            dtype,
            outputs.as_mut_ptr(),
            &mut scales,
        ))?;
        Ok((outputs.into_iter().map(|output| Tensor::from_ptr(output)).collect(), Tensor::from_ptr(scales)))
    }
}

fn check_bit_linear(
    x: &Tensor,
    prologue: Prologue,
    weights: &[(Option<&Tensor>, &TernaryWeight)],
    kind: Kind,
) -> Result<(), Error> {
    let fail = |what: String| Err(Error::Other(format!("bit linear: {what}")));
    check_kinds("bit linear", [x.kind(), kind])?;
    if weights.is_empty() {
        return fail("no weights".into());
    }
    let device = x.device();
    let halves = if matches!(prologue, Prologue::SwiGlu) { 2 } else { 1 };
    for (weight, ternary) in weights {
        let size = ternary.size;
        if x.size().last().is_none_or(|&width| width != halves * size[1]) {
            return fail(format!("x {:?} and weight {size:?} do not fit", x.size()));
        }
        let (kind, own) = weight.map_or((Kind::Float, size.to_vec()), |weight| (weight.kind(), weight.size()));
        if kind != Kind::Float || own != size {
            return fail(format!("a ternary weight {size:?} is not that of {kind:?} {own:?}"));
        }
        if weight.is_some() && ternary.codes.is_none() {
            return fail("a ternary weight that is for inference has no backward".into());
        }
        if weight.is_some_and(|weight| weight.device() != device) || ternary.gamma.device() != device {
            return fail(format!("a weight is not on x's device, {device:?}"));
        }
    }
    if let Prologue::RmsNorm { weight, .. } = prologue {
        let fits = weight.kind() == Kind::Float && weight.size() == [x.size()[x.dim() - 1]];
        if !fits || weight.device() != device || !weight.is_contiguous() {
            return fail(format!("a norm's {:?} weight {:?} for x {:?}", weight.kind(), weight.size(), x.size()));
        }
    }
    Ok(())
}

fn check_kinds(what: &str, kinds: impl IntoIterator<Item = Kind>) -> Result<(), Error> {
    match kinds.into_iter().find(|kind| !matches!(kind, Kind::Float | Kind::BFloat16 | Kind::Half)) {
        Some(kind) => Err(Error::Other(format!("{what}: dtype {kind:?} is none of Float, BFloat16 and Half"))),
        None => Ok(()),
    }
}

/// Turns each head's vector by its position's angles (Su et al. 2021, arXiv 2104.09864), half-split: with a and b the
/// halves of D, (a cos - b sin, a sin + b cos), computed in fp32. Differentiable once in `x`.
///
/// # Shapes
/// `x`: `[B, T, H, D]`, any strides; `cos`, `sin`: `[T, D / 2]` fp32. Returns `[B, T, H, D]` in x's dtype, contiguous.
///
/// # Dtypes
/// Float, BFloat16 or Half.
///
/// # Errors
/// Other dtypes, shapes or devices; a value of `BBT_CPU_KERNELS` that is none.
pub fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor, Error> {
    rope_with(CpuKernels::chosen()?, x, cos, sin)
}

fn rope_with(kernels: CpuKernels, x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor, Error> {
    check_kinds("rope", [x.kind()])?;
    let size = x.size();
    let fits = |table: &Tensor| {
        table.kind() == Kind::Float && table.device() == x.device() && table.size() == [size[1], size[3] / 2]
    };
    if size.len() != 4 || size[3] % 2 != 0 || !fits(cos) || !fits(sin) {
        let tables = [cos, sin].map(|table| (table.kind(), table.device(), table.size()));
        return Err(Error::Other(format!(
            "rope: x {size:?} on {:?} and the tables {tables:?} are not [B, T, H, D] and twice [T, D / 2] Float",
            x.device()
        )));
    }
    let (cos, sin) = (cos.contiguous(), sin.contiguous());
    let mut out = ptr::null_mut();
    // SAFETY: three live tensors of one device and of the dtypes and shapes that the kernels expect, and room for one
    // pointer to a new tensor, which we own. This CPU runs `kernels`.
    unsafe {
        ffi::check(ffi::bbt_rope(kernels, x.as_ptr(), cos.as_ptr(), sin.as_ptr(), &mut out))?;
        Ok(Tensor::from_ptr(out))
    }
}

/// The mean of -log softmax(logits)\[target\], computed in fp32; of no rows it is not a number. Differentiable once in
/// the logits.
///
/// # Shapes
/// `logits`: `[..., V]`, `targets`: `[...]` int64 within `0 .. V` → `[]` fp32.
///
/// # Dtypes
/// `logits`: Float, BFloat16 or Half.
///
/// # Errors
/// Other dtypes, shapes or devices; on the CPU a target outside; a value of `BBT_CPU_KERNELS` that is none.
pub fn cross_entropy_mean(logits: &Tensor, targets: &Tensor) -> Result<Tensor, Error> {
    cross_entropy_mean_with(CpuKernels::chosen()?, logits, targets)
}

fn cross_entropy_mean_with(kernels: CpuKernels, logits: &Tensor, targets: &Tensor) -> Result<Tensor, Error> {
    check_kinds("cross entropy", [logits.kind()])?;
    let (size, targets_size) = (logits.size(), targets.size());
    let fits = size.split_last().is_some_and(|(&classes, rows)| classes > 0 && rows == targets_size)
        && targets.kind() == Kind::Int64
        && targets.device() == logits.device();
    if !fits {
        return Err(Error::Other(format!(
            "cross entropy: logits {size:?} and {:?} targets {targets_size:?} are not [..., V] and [...] Int64 on one \
             device",
            targets.kind()
        )));
    }
    let mut out = ptr::null_mut();
    // SAFETY: two live tensors of one device and of the dtypes and shapes that the kernels expect, and room for one
    // pointer to a new tensor, which we own. This CPU runs `kernels`.
    unsafe {
        ffi::check(ffi::bbt_cross_entropy_mean(kernels, logits.as_ptr(), targets.as_ptr(), &mut out))?;
        Ok(Tensor::from_ptr(out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::libtorch::cpu_kernels::tests::runnable as kernels;
    use crate::libtorch::random::{self, integers, randn};
    use crate::libtorch::{Autocast, AutocastDtype, recompute_in_backward, tensor_version};
    use crate::quantization::{TernaryQuantSTE, act_quant, ternary_quant};
    use tch::Device;

    const KINDS: [Kind; 3] = [Kind::Float, Kind::BFloat16, Kind::Half];

    fn codes(ternary: &TernaryWeight) -> Tensor {
        ternary.codes().expect("codes").to_kind(Kind::Float)
    }

    fn leaf(x: &Tensor) -> Tensor {
        x.detach().copy().set_requires_grad(true)
    }

    /// The largest difference, relative to the largest value that is expected.
    fn error(actual: &Tensor, expected: &Tensor) -> f64 {
        assert_eq!(actual.size(), expected.size());
        if expected.numel() == 0 {
            return 0.0;
        }
        let expected = expected.to_kind(Kind::Double);
        let largest = expected.abs().max().double_value(&[]).max(1e-30);
        let error = (actual.to_kind(Kind::Double) - expected).abs().max().double_value(&[]) / largest;
        assert!(!error.is_nan());
        error
    }

    fn tolerance(kind: Kind) -> f64 {
        match kind {
            Kind::Float => 1e-5,
            _ => 1e-2,
        }
    }

    /// Codes and scales of `x`, `[N, D]`, read off products with the identity: each output is a code times its scale.
    fn quantized(kernels: CpuKernels, x: &Tensor) -> Tensor {
        let eye = Tensor::eye(x.size()[1], (Kind::Float, Device::Cpu));
        // gamma is 1 / D; a code of 1 for each.
        let ternary = TernaryWeight::with(kernels, &eye).unwrap();
        assert!(codes(&ternary).equal(&eye));
        let ternary = TernaryWeight { gamma: ternary.gamma.ones_like(), ..ternary };
        bit_linear_with(kernels, x, Prologue::None, &[(&eye, &ternary)], false, Kind::Float).unwrap().remove(0)
    }

    #[test]
    fn activations_are_those_of_the_reference_exactly() {
        random::seed();
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
        random::seed();
        // The scale is exactly 1.
        let x = Tensor::from_slice(&[127.0f32, 0.5, 1.5, 2.5, -0.5, -1.5, 125.5, 126.5]).view([1, 8]);
        let expected = Tensor::from_slice(&[127.0f32, 0.0, 2.0, 2.0, 0.0, -2.0, 126.0, 126.0]).view([1, 8]);
        for kernels in kernels() {
            assert!(quantized(kernels, &x).equal(&expected), "{kernels:?}");
        }
    }

    #[test]
    fn weights_are_those_of_the_reference() {
        random::seed();
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
            assert!(
                codes(&zeros).abs().max().double_value(&[]) == 0.0 && zeros.gamma.double_value(&[]) == 1e-8f32 as f64
            );
        }
    }

    /// Codes `x`, of which each row has a 127, and weights `w` of -1, 0 and 1: scales and gamma are exactly 1.
    fn product_is_exact(x: &Tensor, w: &Tensor, what: &str) {
        let ones = Tensor::ones([], (Kind::Float, Device::Cpu));
        let expected = x.to_kind(Kind::Int64).matmul(&w.to_kind(Kind::Int64).tr());
        for kernels in kernels() {
            let ternary = TernaryWeight::with(kernels, &(w * 0.5)).unwrap();
            let ternary = TernaryWeight { gamma: ones.copy(), ..ternary };
            if w.abs().mean(Kind::Float).double_value(&[]) > 0.0 {
                assert!(codes(&ternary).equal(w));
            }
            let weights = [(w, &ternary)];
            let y = bit_linear_with(kernels, x, Prologue::None, &weights, false, Kind::Float).unwrap().remove(0);
            assert!(y.to_kind(Kind::Int64).equal(&expected), "{kernels:?} {what}");
            for kind in KINDS {
                let rounded = bit_linear_with(kernels, x, Prologue::None, &weights, false, kind).unwrap();
                assert!(rounded[0].equal(&y.to_kind(kind)), "{kernels:?} {what} {kind:?}");
            }
        }
    }

    #[test]
    fn products_are_exact_and_the_same_for_any_instruction_set() {
        random::seed();
        // The largest sums are within fp32's integers.
        for (n, inner, out) in [(1, 1, 1), (2, 3, 5), (7, 13, 70), (49, 384, 64), (100, 1023, 129), (5, 4096, 17)] {
            let x = (randn(&[n, inner]) * 80.0).round().clamp(-127, 127);
            let _ = x.narrow(1, 0, 1).fill_(127.0);
            let w = integers(-1, 2, &[out, inner]).to_kind(Kind::Float);
            product_is_exact(&x, &w, &format!("{n} {inner} {out}"));
        }
    }

    /// Random signs cancel: no partial sum of theirs comes near 2^15. These grow as fast as sums can, so that one that is
    /// held in 16 bits anywhere would wrap.
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
            product_is_exact(&(&all * 127.0), &all, &format!("{inner}"));
            // More rows than a tile has.
            product_is_exact(&(&all * 127.0).repeat([9, 1]), &all.repeat([30, 1]), &format!("{inner}, repeated"));
        }
    }

    /// What precedes the quantization, by name.
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
            let sum: Tensor =
                ys.iter().zip(&self.dys).map(|(y, dy)| (y * dy.to_kind(y.kind())).sum(Kind::Double)).sum();
            sum.backward();
            let mut results: Vec<_> = ys.iter().map(Tensor::detach).collect();
            results.push(x.grad());
            if self.before == Before::Norm {
                results.push(norm.grad());
            }
            results.extend(weights.iter().map(Tensor::grad));
            results
        }

        fn fused(&self, kernels: CpuKernels, x_kind: Kind, kind: Kind) -> Vec<Tensor> {
            self.run(x_kind, |x, norm, weights| self.forward(kernels, x, norm, weights, kind))
        }

        fn forward(
            &self,
            kernels: CpuKernels,
            x: &Tensor,
            norm: &Tensor,
            weights: &[Tensor],
            kind: Kind,
        ) -> Vec<Tensor> {
            let ternary: Vec<_> = weights.iter().map(|w| TernaryWeight::with(kernels, w).unwrap()).collect();
            let pairs: Vec<_> = weights.iter().zip(&ternary).collect();
            let prologue = match self.before {
                Before::Nothing => Prologue::None,
                Before::Norm => Prologue::RmsNorm { weight: norm, eps: 1e-6 },
                Before::Gate => Prologue::SwiGlu,
            };
            bit_linear_with(kernels, x, prologue, &pairs, self.clipped, kind).unwrap()
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
        fn quantized(&self, kernels: CpuKernels, kind: Kind) -> Tensor {
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
        random::seed();
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
        random::seed();
        let layer = Layer::random(Before::Norm, &[10], 16, &[8, 8], false);
        let (x, norm) = (leaf(&layer.x), layer.norm.detach());
        let weights = [leaf(&layer.weights[0]), layer.weights[1].detach()];
        let ys = layer.forward(CpuKernels::best(), &x, &norm, &weights, Kind::Float);
        // The second output goes nowhere.
        (&ys[0] * &layer.dys[0]).sum(Kind::Float).backward();
        let alone = Layer {
            weights: vec![weights[0].detach()],
            dys: vec![layer.dys[0].detach()],
            x: layer.x.copy(),
            norm: norm.copy(),
            ..layer
        };
        let expected = alone.exact(Kind::Float, &alone.quantized(CpuKernels::best(), Kind::Float));
        assert!(error(&x.grad(), &expected[1]) < 1e-5 && error(&weights[0].grad(), &expected[3]) < 1e-5);
        assert!(!weights[1].grad().defined() && !norm.grad().defined());
        let without = tch::no_grad(|| layer_output(&alone, &x));
        assert!(!without.requires_grad());
    }

    fn layer_output(layer: &Layer, x: &Tensor) -> Tensor {
        layer.forward(CpuKernels::best(), x, &layer.norm, &layer.weights, Kind::Float).remove(0)
    }

    #[test]
    fn the_gradients_of_several_weights_share_no_memory() {
        random::seed();
        let layer = Layer::random(Before::Nothing, &[10], 16, &[8, 8], false);
        let results = layer.fused(CpuKernels::best(), Kind::Float, Kind::Float);
        let before = results[4].copy();
        let _ = results[3].shallow_clone().resize_([32, 32]).fill_(1.0);
        assert!(results[4].equal(&before));
    }

    #[test]
    fn what_is_not_finite_is_not_hidden() {
        random::seed();
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
                        assert!(
                            dweight.isfinite().all().int64_value(&[]) == 0,
                            "{kernels:?} {before:?} {value} {kind:?}"
                        );
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
                let y = bit_linear_with(kernels, &x, Prologue::None, &[(&w, &ternary)], false, Kind::Float).unwrap();
                assert!(y[0].isfinite().any().int64_value(&[]) == 0, "{kernels:?} {value}");
            }
        }
    }

    #[test]
    fn the_same_bits_with_any_number_of_threads() {
        random::seed();
        let threads = tch::get_num_threads();
        for before in [Before::Nothing, Before::Norm, Before::Gate] {
            let mut layer = Layer::random(before, &[3, 301], 200, &[100, 65], true);
            // Small integers and halves: libtorch's product that the gradient of the activations is has one result in
            // whatever order it sums.
            layer.dys.iter_mut().for_each(|dy| *dy = dy.round());
            layer.weights.iter_mut().for_each(|w| *w = w.sign() * 0.5);
            for kind in [Kind::Float, Kind::BFloat16] {
                let results = [1, 2, 3, 8].map(|n| {
                    tch::set_num_threads(n);
                    layer.fused(CpuKernels::best(), Kind::Float, kind)
                });
                let gradients = if before == Before::Norm { 2 } else { 1 };
                let ours = 0..layer.weights.len() + gradients;
                for other in &results[1..] {
                    assert!(ours.clone().all(|i| results[0][i].equal(&other[i])), "{before:?} {kind:?}");
                }
            }
        }
        let (logits, targets) = (randn(&[700, 256]), integers(0, 256, &[700]));
        let losses = [1, 2, 8].map(|n| {
            tch::set_num_threads(n);
            let logits = leaf(&logits);
            let loss = cross_entropy_mean(&logits, &targets).unwrap();
            loss.backward();
            (loss, logits.grad())
        });
        assert!(losses.iter().all(|(loss, grad)| loss.equal(&losses[0].0) && grad.equal(&losses[0].1)));
        tch::set_num_threads(threads);
    }

    #[test]
    fn inside_recomputation_and_autocast() {
        random::seed();
        for kind in [Kind::Float, Kind::BFloat16] {
            let layer = Layer::random(Before::Norm, &[2, 30], 48, &[40], true);
            let plain = layer.fused(CpuKernels::best(), Kind::Float, kind);
            let recomputed = layer.run(Kind::Float, |x, norm, weights| {
                let _region = Autocast::enter(Device::Cpu, AutocastDtype::BFloat16).unwrap();
                let (norm, weight) = (norm.shallow_clone(), weights[0].shallow_clone());
                let ternary = TernaryWeight::new(&weight).unwrap();
                let f = move |x: &Tensor| {
                    let prologue = Prologue::RmsNorm { weight: &norm, eps: 1e-6 };
                    bit_linear(x, prologue, &[(&weight, &ternary)], true, kind).unwrap().remove(0)
                };
                vec![recompute_in_backward(f, x).unwrap()]
            });
            assert!(plain.iter().zip(&recomputed).all(|(a, b)| a.equal(b)), "{kind:?}");
            // Backward inside the region, too.
            let inside = {
                let x = leaf(&layer.x);
                let weights: Vec<_> = layer.weights.iter().map(leaf).collect();
                let y = layer.forward(CpuKernels::best(), &x, &layer.norm, &weights, kind).remove(0);
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
        random::seed();
        let (x, w) = (leaf(&randn(&[3, 8])), leaf(&randn(&[4, 8])));
        let ternary = TernaryWeight::new(&w).unwrap();
        let y = bit_linear(&x, Prologue::None, &[(&w, &ternary)], false, Kind::Float).unwrap().remove(0);
        let error = Tensor::f_run_backward(&[y.sum(Kind::Float)], &[&x], true, true).unwrap_err();
        assert!(error.to_string().contains("no second derivative"), "{error}");
    }

    #[test]
    fn a_weight_that_changed_between_forward_and_its_clipped_backward_is_noticed() {
        random::seed();
        let (x, w) = (randn(&[3, 8]), leaf(&randn(&[4, 8])));
        let ternary = TernaryWeight::new(&w).unwrap();
        let y = bit_linear(&x, Prologue::None, &[(&w, &ternary)], true, Kind::Float).unwrap().remove(0);
        let before = tensor_version(&w).unwrap();
        tch::no_grad(|| {
            let _ = w.shallow_clone().fill_(1.0);
        });
        assert!(tensor_version(&w).unwrap() > before);
        assert!(Tensor::f_run_backward(&[y.sum(Kind::Float)], &[&w], false, false).is_err());
    }

    fn rope_by_formula(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Tensor {
        let (cos, sin) = (cos.unsqueeze(1), sin.unsqueeze(1));
        let halves = x.chunk(2, -1);
        let (a, b) = (&halves[0], &halves[1]);
        Tensor::cat(&[a * &cos - b * &sin, a * &sin + b * &cos], -1)
    }

    #[test]
    fn rope_is_the_formula_and_its_gradient_the_inverse() {
        random::seed();
        for (b, t, h, d) in [(2, 9, 3, 64), (1, 1, 1, 2), (3, 5, 2, 34), (2, 0, 3, 8), (1, 70, 6, 80)] {
            let (cos, sin) = (randn(&[t, d / 2]), randn(&[t, d / 2]));
            for kind in KINDS {
                let (base, dy) = (randn(&[b, h, t, d]).to_kind(kind), randn(&[b, t, h, d]).to_kind(kind));
                let run = |kind: Kind, f: &dyn Fn(&Tensor) -> Tensor| {
                    let base = leaf(&base.to_kind(kind));
                    let y = f(&base.transpose(1, 2));
                    (&y * dy.to_kind(kind)).sum(Kind::Double).backward();
                    [y.detach(), base.grad()]
                };
                let exact = |x: &Tensor| rope_by_formula(x, &cos.to_kind(Kind::Double), &sin.to_kind(Kind::Double));
                let expected = run(Kind::Double, &exact);
                for kernels in kernels() {
                    let actual = run(kind, &|x| rope_with(kernels, x, &cos, &sin).unwrap());
                    assert!(actual[0].is_contiguous() && actual[0].kind() == kind);
                    for (actual, expected) in actual.iter().zip(&expected) {
                        assert!(error(actual, expected) < tolerance(kind), "{kernels:?} {b} {t} {h} {d} {kind:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn cross_entropy_and_its_gradient_are_the_formula() {
        random::seed();
        for (size, classes) in [(vec![2, 33], 256), (vec![1], 3), (vec![5], 1), (vec![100], 259), (vec![], 17)] {
            let targets = integers(0, classes, &size);
            let base = randn(&[size.as_slice(), &[classes]].concat()) * 5.0 + 20.0;
            for kind in KINDS {
                let run = |as_kind: Kind, f: &dyn Fn(&Tensor) -> Tensor| {
                    let logits = leaf(&base.to_kind(kind).to_kind(as_kind));
                    let loss = f(&logits);
                    // Not 1: as of several microbatches.
                    (&loss * 3.0).backward();
                    [loss.detach(), logits.grad()]
                };
                let exact = |logits: &Tensor| {
                    let chosen = logits.gather(-1, &targets.unsqueeze(-1), false).squeeze_dim(-1);
                    (logits.logsumexp([-1], false) - chosen).mean(Kind::Double)
                };
                let expected = run(Kind::Double, &exact);
                for kernels in kernels() {
                    let [loss, grad] = run(kind, &|x| cross_entropy_mean_with(kernels, x, &targets).unwrap());
                    assert_eq!((loss.kind(), grad.kind()), (Kind::Float, kind));
                    let absolute = (loss.to_kind(Kind::Double) - &expected[0]).abs().double_value(&[]);
                    assert!(absolute < 1e-5, "{kernels:?} {size:?} {classes} {kind:?}: {absolute}");
                    // Of probabilities that are up to 1, divided by the rows: where one class has nearly all, what is
                    // left of the difference is small.
                    let unit = 3.0 / size.iter().product::<i64>() as f64;
                    let error = (grad.to_kind(Kind::Double) - &expected[1]).abs().max().double_value(&[]) / unit;
                    assert!(error < tolerance(kind), "{kernels:?} {size:?} {classes} {kind:?}: {error}");
                }
            }
        }
    }

    #[test]
    fn a_loss_that_is_not_finite_stays_so() {
        random::seed();
        let targets = Tensor::from_slice(&[1i64, 2, 0]);
        for kernels in kernels() {
            for value in [f64::NAN, f64::INFINITY] {
                let logits = randn(&[3, 20]);
                let _ = logits.get(1).get(19).fill_(value);
                let logits = leaf(&logits);
                let loss = cross_entropy_mean_with(kernels, &logits, &targets).unwrap();
                loss.backward();
                assert!(!loss.double_value(&[]).is_finite(), "{kernels:?} {value}");
                let finite = logits.grad().isfinite().all_dim(-1, false);
                assert!(finite.equal(&Tensor::from_slice(&[true, false, true])), "{kernels:?} {value}");
            }
            let empty = cross_entropy_mean_with(kernels, &randn(&[0, 4]), &targets.narrow(0, 0, 0)).unwrap();
            assert!(empty.double_value(&[]).is_nan());
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        random::seed();
        let w = randn(&[4, 8]);
        let ternary = TernaryWeight::new(&w).unwrap();
        let weights = [(&w, &ternary)];
        let run = |x: &Tensor, prologue: Prologue, kind| {
            bit_linear(x, prologue, &weights, false, kind).unwrap_err().to_string()
        };
        assert!(run(&randn(&[2, 7]), Prologue::None, Kind::Float).contains("do not fit"));
        assert!(run(&randn(&[2, 8]), Prologue::SwiGlu, Kind::Float).contains("do not fit"));
        assert!(run(&randn(&[2, 8]), Prologue::None, Kind::Double).contains("Double"));
        let norm = randn(&[7]);
        assert!(run(&randn(&[2, 8]), Prologue::RmsNorm { weight: &norm, eps: 1e-6 }, Kind::Float).contains("norm"));
        assert!(TernaryWeight::new(&randn(&[3])).is_err() && TernaryWeight::new(&w.to_kind(Kind::Double)).is_err());
        assert!(rope(&randn(&[1, 2, 3, 4]), &randn(&[2, 3]), &randn(&[2, 3])).is_err());
        assert!(rope(&randn(&[2, 4]), &randn(&[2, 2]), &randn(&[2, 2])).is_err());
        let targets = Tensor::from_slice(&[0i64, 4]);
        assert!(cross_entropy_mean(&randn(&[3, 4]), &targets).is_err());
        let error = cross_entropy_mean(&randn(&[2, 4]), &targets).unwrap_err();
        assert!(error.to_string().contains("target 4"), "{error}");
    }
}

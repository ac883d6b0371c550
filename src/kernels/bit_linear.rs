//! BitLinear layers in few passes over memory, with a backward of their own: the norm or the gate together with the
//! quantization, then the product of the integers.
//!
//! The kernels are those of the tensors' device. On the CPU, the number of threads changes no bit of what they compute;
//! the gradients are libtorch's matrix products, for which it may. The products of integers are exact, and the same for
//! every instruction set.

use std::ffi::c_int;
use std::ptr;

use tch::{Kind, Tensor};

use super::cpu_features::CpuFeatures;
use super::{check_kinds, ffi};
use crate::libtorch::Error;

/// A weight quantized to -1, 0 and 1 times gamma = mean|w|, the form in which [`bit_linear`] multiplies with it (BitNet
/// b1.58, arXiv 2402.17764, equations 1–3). It does not follow later changes of the weight.
#[derive(Debug)]
pub struct TernaryWeight {
    /// `[out, in]`
    size: [i64; 2],
    /// `[out, in]` int8. None if it was dropped because products read `packed`.
    codes: Option<Tensor>,
    /// `[]` fp32
    gamma: Tensor,
    /// The codes in the order in which the device's product reads them. None if it reads `codes`.
    packed: Option<Tensor>,
}

impl TernaryWeight {
    /// Quantizes `w`, `[out, in]` fp32. No gradient flows through this: [`bit_linear`] computes the weight's.
    ///
    /// # Errors
    /// Another shape or dtype; a device without kernels; an unknown value of `BBT_CPU_KERNELS`.
    pub fn new(w: &Tensor) -> Result<Self, Error> {
        Self::with(CpuFeatures::chosen()?, w)
    }

    fn with(features: CpuFeatures, w: &Tensor) -> Result<Self, Error> {
        if w.kind() != Kind::Float || w.dim() != 2 || w.numel() == 0 {
            return Err(Error::Other(format!("ternary weight: {:?} {:?} is not [out, in] Float", w.kind(), w.size())));
        }
        let [mut codes, mut gamma, mut packed] = [ptr::null_mut(); 3];
        // SAFETY: a live tensor of the dtype and shape that the kernels expect, and room for three pointers to new
        // tensors, which we own; the last may stay null. This CPU has `features`.
        unsafe {
            ffi::check(ffi::bbt_ternary_weight(features.bits(), w.as_ptr(), &mut codes, &mut gamma, &mut packed))?;
            Ok(Self {
                size: [w.size()[0], w.size()[1]],
                codes: Some(Tensor::from_ptr(codes)),
                gamma: Tensor::from_ptr(gamma),
                packed: (!packed.is_null()).then(|| Tensor::from_ptr(packed)),
            })
        }
    }

    /// Drops the codes if products do not read them, which halves the memory. There is no backward then.
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

/// What [`bit_linear`] computes of its input before it quantizes.
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
    /// silu(gate) · up, where x is the gate followed by up (Shazeer 2020, arXiv 2002.05202).
    SwiGlu,
}

/// x Wᵀ for several weights W (BitNet b1.58, arXiv 2402.17764, §2). The activations are quantized once, to int8 with a
/// scale of absmax / 127 per token, and the product of the integers is exact.
///
/// Gradients are straight-through: the quantized activations pass theirs on to what was quantized, and a weight gets
/// that of its quantized form, or with `clipped` zero where |w| > gamma. Backward's products run in `kind`, except that
/// the CPU computes those of Half in fp32; each gradient has the dtype of its tensor. The operation is differentiable
/// once, and autocast does not reach inside. A row with a value that is not finite has outputs that are not a number.
///
/// # Shapes
/// `x`: `[..., in]`, before SwiGLU `[..., 2 in]`; `weights`: `[out, in]` fp32 each, the tensor that gets the gradient
/// and its quantized form. The tensor may be left out where there is no backward pass. Returns `[..., out]` for each
/// weight, as `kind`, and `[N]` fp32 without a gradient: the scales of the N tokens. 127 times a scale is the largest
/// absolute value of its row after the prologue, at least 1e-8.
///
/// # Dtypes
/// `x` and `kind`: Float, BFloat16 or Half. Norm, gate and quantization are computed in fp32.
///
/// # Errors
/// Other dtypes, shapes or devices; a gradient that is wanted of `x` where a weight's tensor was left out; an unknown
/// value of `BBT_CPU_KERNELS`.
pub fn bit_linear(
    x: &Tensor,
    prologue: Prologue,
    weights: &[(Option<&Tensor>, &TernaryWeight)],
    clipped: bool,
    kind: Kind,
) -> Result<(Vec<Tensor>, Tensor), Error> {
    bit_linear_with(CpuFeatures::chosen()?, x, prologue, weights, clipped, kind)
}

fn bit_linear_with(
    features: CpuFeatures,
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
    // SAFETY: live tensors of one device, of the dtypes and shapes that the kernels expect; four of them for each
    // weight, of which some may be null where there is no backward, and a number of rows. Room for one pointer to a new
    // tensor per weight and for one more, which we own. This CPU has `features`.
    unsafe {
        ffi::check(ffi::bbt_bit_linear(
            features.bits(),
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

#[cfg(test)]
mod tests;

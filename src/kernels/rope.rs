//! Rotary position embedding, half-split, in one pass over memory with its own backward.

use std::ptr;

use tch::{Kind, Tensor};

use super::cpu_features::CpuFeatures;
use super::{check_kinds, ffi};
use crate::libtorch::Error;

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
/// Other dtypes, shapes or devices; an unknown value of `BBT_CPU_KERNELS`.
pub fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor, Error> {
    rope_with(CpuFeatures::chosen()?, x, cos, sin)
}

fn rope_with(features: CpuFeatures, x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor, Error> {
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
    // pointer to a new tensor, which we own. This CPU has `features`.
    unsafe {
        ffi::check(ffi::bbt_rope(features.bits(), x.as_ptr(), cos.as_ptr(), sin.as_ptr(), &mut out))?;
        Ok(Tensor::from_ptr(out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::cpu_features::tests::runnable as kernels;
    use crate::kernels::testing::{self, KINDS, error, leaf, randn, tolerance};

    fn rope_by_formula(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Tensor {
        let (cos, sin) = (cos.unsqueeze(1), sin.unsqueeze(1));
        let halves = x.chunk(2, -1);
        let (a, b) = (&halves[0], &halves[1]);
        Tensor::cat(&[a * &cos - b * &sin, a * &sin + b * &cos], -1)
    }

    #[test]
    fn rope_is_the_formula_and_its_gradient_the_inverse() {
        testing::seed();
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
    fn what_does_not_fit_is_refused() {
        testing::seed();
        assert!(rope(&randn(&[1, 2, 3, 4]), &randn(&[2, 3]), &randn(&[2, 3])).is_err());
        assert!(rope(&randn(&[2, 4]), &randn(&[2, 2]), &randn(&[2, 2])).is_err());
    }
}

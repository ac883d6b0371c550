//! Cross-entropy of logits, in one pass over memory with its own backward.

use std::ptr;

use tch::{Kind, Tensor};

use super::cpu_features::CpuFeatures;
use super::{check_kinds, ffi};
use crate::libtorch::Error;

/// The mean of -log softmax(logits)\[target\], computed in fp32; not a number if there are no rows. Differentiable once
/// in the logits.
///
/// # Shapes
/// `logits`: `[..., V]`, `targets`: `[...]` int64 within `0 .. V` → `[]` fp32.
///
/// # Dtypes
/// `logits`: Float, BFloat16 or Half.
///
/// # Errors
/// Other dtypes, shapes or devices; on the CPU a target that is no class; an unknown value of `BBT_CPU_KERNELS`.
pub fn cross_entropy_mean(logits: &Tensor, targets: &Tensor) -> Result<Tensor, Error> {
    cross_entropy_mean_with(CpuFeatures::chosen()?, logits, targets)
}

fn cross_entropy_mean_with(features: CpuFeatures, logits: &Tensor, targets: &Tensor) -> Result<Tensor, Error> {
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
    // pointer to a new tensor, which we own. This CPU has `features`.
    unsafe {
        ffi::check(ffi::bbt_cross_entropy_mean(features.bits(), logits.as_ptr(), targets.as_ptr(), &mut out))?;
        Ok(Tensor::from_ptr(out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::cpu_features::tests::runnable as kernels;
    use crate::kernels::testing::{self, KINDS, integers, leaf, randn, tolerance};

    #[test]
    fn cross_entropy_and_its_gradient_are_the_formula() {
        testing::seed();
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
        testing::seed();
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
    fn the_same_bits_with_any_number_of_threads() {
        testing::seed();
        let threads = tch::get_num_threads();
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
    fn what_does_not_fit_is_refused() {
        testing::seed();
        let targets = Tensor::from_slice(&[0i64, 4]);
        assert!(cross_entropy_mean(&randn(&[3, 4]), &targets).is_err());
        let error = cross_entropy_mean(&randn(&[2, 4]), &targets).unwrap_err();
        assert!(error.to_string().contains("target 4"), "{error}");
    }
}

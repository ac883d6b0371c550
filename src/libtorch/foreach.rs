//! Operations over all parameters at once: `torch._fused_adamw_`, `torch._foreach_norm`, and the
//! gradient scaler's unscale.

use tch::{Device, Kind, Tensor};

use super::{Error, ffi, mark_written};

/// The scalars of one AdamW step, with the names of `torch.optim.AdamW`.
#[derive(Debug, Clone, Copy)]
pub struct AdamWStep {
    /// Learning rate of this step.
    pub lr: f64,
    /// Decay rates of the first and second moment.
    pub betas: (f64, f64),
    /// Added to the denominator.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
}

/// One fused AdamW step over all parameters, in place.
///
/// `params`, `grads`, `exp_avgs` and `exp_avg_sqs` have equal shapes pairwise; `steps` are fp32 `[]`
/// on the parameters' device. If `found_inf` (fp32 `[]`) is 1, nothing changes, the step counts included.
///
/// # Errors
/// Lists of different lengths, or libtorch's own error.
pub fn fused_adamw(
    params: &[Tensor],
    grads: &[Tensor],
    exp_avgs: &[Tensor],
    exp_avg_sqs: &[Tensor],
    steps: &[Tensor],
    step: AdamWStep,
    found_inf: &Tensor,
) -> Result<(), Error> {
    let n = params.len();
    if [grads.len(), exp_avgs.len(), exp_avg_sqs.len(), steps.len()] != [n; 4] {
        return Err(Error::Other("fused_adamw needs lists of one length".into()));
    }
    // libtorch refuses empty lists, here and below, but a rank may own none of the parameters.
    if n == 0 {
        return Ok(());
    }
    let _no_grad = tch::no_grad_guard();
    let (p, g) = (ffi::pointers(params), ffi::pointers(grads));
    let (m, v, s) = (ffi::pointers(exp_avgs), ffi::pointers(exp_avg_sqs), ffi::pointers(steps));
    // SAFETY: five lists of n live tensors; libtorch checks shapes and dtypes itself. The tensors are
    // written through shared references, as every in-place operation on a libtorch handle does.
    ffi::check(unsafe {
        ffi::bbt_fused_adamw(
            p.as_ptr(),
            g.as_ptr(),
            m.as_ptr(),
            v.as_ptr(),
            s.as_ptr(),
            n,
            step.lr,
            step.betas.0,
            step.betas.1,
            step.weight_decay,
            step.eps,
            found_inf.as_ptr(),
        )
    })?;
    // The operator itself does not count what it writes to.
    mark_written(params)
}

/// The L2 norm of each of the n `tensors`: fp32 `[n]`, on their device. The norm of these is that of all of them
/// taken as one vector, as `torch.nn.utils.get_total_norm` computes it. Of none, `[0]` on the CPU.
///
/// # Errors
/// libtorch's own error.
pub fn foreach_norms(tensors: &[Tensor]) -> Result<Tensor, Error> {
    if tensors.is_empty() {
        return Ok(Tensor::zeros([0], (Kind::Float, Device::Cpu)));
    }
    let _no_grad = tch::no_grad_guard();
    let list = ffi::pointers(tensors);
    let mut norms = std::ptr::null_mut();
    // SAFETY: a list of live tensors. On success the shim has stored one new tensor, which we own.
    unsafe {
        ffi::check(ffi::bbt_foreach_norms(list.as_ptr(), list.len(), &mut norms))?;
        Ok(Tensor::from_ptr(norms))
    }
}

/// Multiplies all `tensors` by `factor` (`[]`, on their device), in place.
///
/// # Errors
/// libtorch's own error.
pub fn foreach_mul(tensors: &[Tensor], factor: &Tensor) -> Result<(), Error> {
    if tensors.is_empty() {
        return Ok(());
    }
    let _no_grad = tch::no_grad_guard();
    let list = ffi::pointers(tensors);
    // SAFETY: a list of live tensors and a live factor.
    ffi::check(unsafe { ffi::bbt_foreach_mul(list.as_ptr(), list.len(), factor.as_ptr()) })
}

/// Multiplies all `grads` by `inverse_scale` in place, and sets `found_inf` to 1 if any element is not
/// finite (`GradScaler.unscale_`). Both scalars are fp32 `[]` or `[1]`.
///
/// # Errors
/// libtorch's own error.
pub fn amp_unscale(grads: &[Tensor], found_inf: &Tensor, inverse_scale: &Tensor) -> Result<(), Error> {
    if grads.is_empty() {
        return Ok(());
    }
    let _no_grad = tch::no_grad_guard();
    let list = ffi::pointers(grads);
    // SAFETY: a list of live tensors and two live scalars.
    ffi::check(unsafe { ffi::bbt_amp_unscale(list.as_ptr(), list.len(), found_inf.as_ptr(), inverse_scale.as_ptr()) })
}

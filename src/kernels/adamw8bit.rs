//! AdamW with 8-bit moments, as in bitsandbytes (Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization",
//! arXiv 2110.02861), on the CPU and on CUDA.

use tch::{Device, Kind, Tensor};

use super::cpu_features::CpuFeatures;
use super::ffi;
use crate::libtorch::{AdamWStep, Error, mark_written};

/// The number of neighbouring elements that share one scale.
pub const BLOCK: i64 = 256;

/// The number of blocks of `n` elements, the last of which may be shorter.
pub fn blocks(n: i64) -> i64 {
    (n + BLOCK - 1) / BLOCK
}

/// The 256 values, ascending from -1 to 1, that codes stand for; an element is its value times its block's scale, the
/// largest magnitude of the block.
///
/// As in bitsandbytes' CPU library (0.50), a number is first rounded to one of 65536 numbers from -1 to 1, evenly
/// spaced and none of them zero, and then to the value nearest to that.
#[derive(Debug)]
pub struct CodeBook {
    /// fp32 `[256]`
    values: Tensor,
    /// The code of the value nearest to each of the 65536 numbers: uint8 `[65536]`.
    nearest: Tensor,
}

impl CodeBook {
    /// The code book of `values`, on `device`, where the moments are.
    pub fn new(values: &[f32; 256], device: Device) -> Self {
        let between: Vec<f64> = values.windows(2).map(|pair| (f64::from(pair[0]) + f64::from(pair[1])) / 2.0).collect();
        // Numbers and values both ascend, so one pass finds all. It must be quick: a checkpoint of N ranks makes 2 N
        // books.
        let mut code = 0;
        let mut nearest_to = |place: i32| {
            let number = f64::from(place) / 32767.5 - 1.0;
            code += between[code..].iter().take_while(|&&bound| bound < number).count();
            code as u8
        };
        let nearest: Vec<u8> = (0..1 << 16).map(&mut nearest_to).collect();
        let on_device = |tensor: Tensor| tensor.to_device(device);
        Self { values: on_device(Tensor::from_slice(values)), nearest: on_device(Tensor::from_slice(&nearest)) }
    }

    /// Another handle to the same tensors.
    pub fn shallow_clone(&self) -> Self {
        Self { values: self.values.shallow_clone(), nearest: self.nearest.shallow_clone() }
    }

    /// The values: fp32 `[256]`.
    pub fn values(&self) -> &Tensor {
        &self.values
    }

    /// Quantizes `x`, fp32 of any shape and finite, in blocks of [`BLOCK`].
    pub fn quantize(&self, x: &Tensor) -> Moment8bit {
        let _no_grad = tch::no_grad_guard();
        let n = x.numel() as i64;
        let padding = (BLOCK - n % BLOCK) % BLOCK;
        let blocks = x.reshape([-1]).constant_pad_nd([0, padding]).view([-1, BLOCK]);
        let absmax = blocks.abs().amax([1], false);
        // A block of zeros stays zero.
        let divisor = absmax.where_self(&absmax.gt(0.0), &absmax.ones_like());
        let places: Tensor = (blocks / divisor.unsqueeze(1) + 1.0) * 32767.5 + 0.5;
        let codes = self.nearest.index_select(0, &places.to_kind(Kind::Int64).view([-1]));
        Moment8bit { codes: codes.narrow(0, 0, n).reshape(x.size()).copy(), absmax }
    }

    /// The numbers that `moment` stands for: fp32, in its shape.
    pub fn dequantize(&self, moment: &Moment8bit) -> Tensor {
        let _no_grad = tch::no_grad_guard();
        let n = moment.codes.numel() as i64;
        let values = self.values.index_select(0, &moment.codes.to_kind(Kind::Int64).view([-1]));
        let scales = moment.absmax.repeat_interleave_self_int(BLOCK, 0, None).narrow(0, 0, n);
        (values * scales).view_as(&moment.codes)
    }

    fn pointers(&self) -> Vec<*const torch_sys::C_tensor> {
        ffi::pointers(&[&self.values, &self.nearest])
    }
}

/// A moment of one parameter in 8 bits.
#[derive(Debug)]
pub struct Moment8bit {
    /// Indices into the code book: uint8, with the parameter's shape.
    pub codes: Tensor,
    /// The largest magnitude of each block: fp32 `[blocks]`.
    pub absmax: Tensor,
}

impl Moment8bit {
    /// The moment of a parameter of shape `size` before the first step, all zeros as in bitsandbytes.
    pub fn zeros(size: &[i64], device: Device) -> Self {
        Self {
            codes: Tensor::zeros(size, (Kind::Uint8, device)),
            absmax: Tensor::zeros([blocks(size.iter().product())], (Kind::Float, device)),
        }
    }

    /// A view `[len]` of the elements from `start` on. `start` begins a block; the end is that of a block or of the
    /// moment.
    pub fn narrow(&self, start: i64, len: i64) -> Self {
        Self {
            codes: self.codes.view([-1]).narrow(0, start, len),
            absmax: self.absmax.narrow(0, start / BLOCK, blocks(len)),
        }
    }
}

/// One AdamW step over all parameters, in place: each block of moments is dequantized to fp32, updated, used for the
/// step, and quantized again. The result has the same bits for any number of threads.
///
/// `params`, `grads` (both fp32) and `moments`, a first and a second one for each parameter, have equal shapes
/// pairwise; `steps` are fp32 `[]`, and are incremented. All are on one device. `books` holds the code book of the
/// first moments and that of the second. If `found_inf` (fp32 `[]`) is 1, nothing changes, the step counts included.
///
/// On CUDA the kernel is that of [`super::AdamW8bitKernel::find`]. With our own this does not wait for the device; with
/// bitsandbytes' it does.
///
/// # Errors
/// Lists of different lengths, other dtypes, sizes or devices; an unknown value of `BBT_CPU_KERNELS`; on CUDA,
/// those of [`super::AdamW8bitKernel::find`].
pub fn adamw8bit(
    params: &[Tensor],
    grads: &[Tensor],
    moments: &[[&Moment8bit; 2]],
    steps: &[Tensor],
    books: [&CodeBook; 2],
    step: AdamWStep,
    found_inf: &Tensor,
) -> Result<(), Error> {
    adamw8bit_with(CpuFeatures::chosen()?, params, grads, moments, steps, books, step, found_inf)
}

#[allow(clippy::too_many_arguments)] // those of `adamw8bit`, and one more
fn adamw8bit_with(
    features: CpuFeatures,
    params: &[Tensor],
    grads: &[Tensor],
    moments: &[[&Moment8bit; 2]],
    steps: &[Tensor],
    books: [&CodeBook; 2],
    step: AdamWStep,
    found_inf: &Tensor,
) -> Result<(), Error> {
    let n = params.len();
    if [grads.len(), moments.len(), steps.len()] != [n; 3] {
        return Err(Error::Other("adamw8bit needs lists of one length".into()));
    }
    let _no_grad = tch::no_grad_guard();
    let tensors = |which: usize, tensor: fn(&Moment8bit) -> &Tensor| -> Vec<_> {
        moments.iter().map(|pair| tensor(pair[which]).as_ptr()).collect()
    };
    let (p, g, s) = (ffi::pointers(params), ffi::pointers(grads), ffi::pointers(steps));
    let (codes1, absmax1) = (tensors(0, |m| &m.codes), tensors(0, |m| &m.absmax));
    let (codes2, absmax2) = (tensors(1, |m| &m.codes), tensors(1, |m| &m.absmax));
    let [book1, book2] = books.map(CodeBook::pointers);
    // SAFETY: seven lists of n live tensors and two of two; the shim checks devices, dtypes and sizes before it reads
    // or writes. This CPU has `features`. The tensors are written through shared references, as every in-place
    // operation on a libtorch handle does.
    ffi::check(unsafe {
        ffi::bbt_adamw8bit(
            features.bits(),
            p.as_ptr(),
            g.as_ptr(),
            codes1.as_ptr(),
            absmax1.as_ptr(),
            codes2.as_ptr(),
            absmax2.as_ptr(),
            s.as_ptr(),
            n,
            book1.as_ptr(),
            book2.as_ptr(),
            step.lr,
            step.betas.0,
            step.betas.1,
            step.weight_decay,
            step.eps,
            found_inf.as_ptr(),
        )
    })?;
    mark_written(params)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::cpu_features::{AVX512, tests::runnable};
    use crate::kernels::testing::{self, rand, randn};

    const CPU: (Kind, Device) = (Kind::Float, Device::Cpu);

    /// Random values as dense as those of bitsandbytes, at least half a percent apart.
    fn book(signed: bool) -> CodeBook {
        let logs = rand(&[127]) * 0.04 + 0.06;
        let magnitudes = Vec::<f32>::try_from((-logs.cumsum(0, Kind::Float)).exp()).unwrap();
        let negative = magnitudes.iter().map(|m| -m);
        let mut values: Vec<f32> = match signed {
            true => negative.chain([0.0, 1.0]).chain(magnitudes.iter().copied()).collect(),
            false => magnitudes.iter().flat_map(|m| [*m, m * 0.98]).chain([0.0, 1.0]).collect(),
        };
        values.sort_by(f32::total_cmp);
        CodeBook::new(&values.try_into().unwrap(), Device::Cpu)
    }

    #[test]
    fn quantizing_finds_the_nearest_value() {
        testing::seed();
        for signed in [true, false] {
            let book = book(signed);
            let x = randn(&[3, 301]) * (randn(&[3, 301]) * 4.0).exp();
            let x = if signed { x } else { x.abs() };
            let moment = book.quantize(&x);
            assert_eq!((moment.codes.size(), moment.absmax.size()), (vec![3, 301], vec![4]));
            let scales = moment.absmax.repeat_interleave_self_int(BLOCK, 0, None).narrow(0, 0, 903).view([3, 301]);
            let candidates = scales.unsqueeze(-1).to_kind(Kind::Double) * book.values().to_kind(Kind::Double);
            let least = (x.unsqueeze(-1) - candidates).abs().amin([-1], false);
            let taken = (&x - book.dequantize(&moment)).abs();
            // Twice the rounding to the even spacing, which is half of 1 / 32767.5.
            assert!((taken - least).gt_tensor(&(&scales * 3.1e-5)).any().int64_value(&[]) == 0);
        }
        let zeros = book(true).quantize(&Tensor::zeros([300], CPU));
        assert_eq!(zeros.absmax.abs().max().double_value(&[]), 0.0);
        assert_eq!(book(true).dequantize(&zeros).abs().max().double_value(&[]), 0.0);
    }

    /// A step in fp64, without the final quantization: parameter, first and second moment, and the sum of the
    /// magnitudes of the parameter's terms, by which rounding errors are bounded.
    fn reference(
        p: &Tensor,
        g: &Tensor,
        moments: [&Moment8bit; 2],
        books: [&CodeBook; 2],
        t: i32,
        s: AdamWStep,
    ) -> [Tensor; 4] {
        let double = |x: &Tensor| x.detach().to_kind(Kind::Double);
        let g = double(g);
        let (kept, new) = (double(&books[0].dequantize(moments[0])) * s.betas.0, &g * (1.0 - s.betas.0));
        let m = &kept + &new;
        let v = double(&books[1].dequantize(moments[1])) * s.betas.1 + g.square() * (1.0 - s.betas.1);
        let denominator = (&v / (1.0 - s.betas.1.powi(t))).sqrt() + s.eps;
        let moves = |m: &Tensor| m / (1.0 - s.betas.0.powi(t)) * s.lr / &denominator;
        let terms = double(p).abs() + moves(&(kept.abs() + new.abs()));
        let p = double(p) * (1.0 - s.lr * s.weight_decay) - moves(&m);
        [p, m, v, terms]
    }

    #[test]
    fn every_instruction_sets_step_is_that_in_fp64() {
        testing::seed();
        let books = [&book(true), &book(false)];
        let s = AdamWStep { lr: 3e-2, betas: (0.9, 0.95), eps: 1e-8, weight_decay: 0.1 };
        for kernels in runnable() {
            // Whole and partial blocks; more than one task.
            for size in [&[1][..], &[255], &[256], &[3, 257], &[40, 512], &[65, 1023]] {
                let p = randn(size).set_requires_grad(true);
                let moments = [Moment8bit::zeros(size, Device::Cpu), Moment8bit::zeros(size, Device::Cpu)];
                let step = Tensor::zeros([], CPU);
                for t in 1..5 {
                    let g = randn(size) * (randn(size) * 2.0).exp();
                    let moments = [&moments[0], &moments[1]];
                    let expected = reference(&p, &g, moments, books, t, s);
                    let (params, steps) = ([p.shallow_clone()], [step.shallow_clone()]);
                    let step = |found: f64| {
                        let found_inf = Tensor::full([], found, CPU);
                        adamw8bit_with(
                            kernels,
                            &params,
                            &[g.shallow_clone()],
                            &[moments],
                            &steps,
                            books,
                            s,
                            &found_inf,
                        )
                        .unwrap();
                    };
                    let before = [p.detach().copy(), moments[0].codes.copy(), moments[1].absmax.copy()];
                    step(1.0);
                    let after = [p.detach(), moments[0].codes.shallow_clone(), moments[1].absmax.shallow_clone()];
                    assert!(before.iter().zip(&after).all(|(b, a)| b.equal(a)), "a skipped step changes nothing");
                    step(0.0);
                    assert_eq!(steps[0].double_value(&[]), f64::from(t));
                    let what = format!("{kernels:?} {size:?} step {t}");
                    let error = ((p.detach() - &expected[0]).abs() / &expected[3]).max().double_value(&[]);
                    assert!(error < 1e-6, "{what}: {error}");
                    for i in 0..2 {
                        let wanted = books[i].quantize(&expected[i + 1].to_kind(Kind::Float));
                        // Where the gradient cancels the moment, rounding errs by a part of them, not of the
                        // difference.
                        let error = (&moments[i].absmax - &wanted.absmax).abs().max().double_value(&[]);
                        let largest = g.abs().max().double_value(&[]).max(wanted.absmax.max().double_value(&[]));
                        assert!(error < 1e-6 * largest.max(largest * largest), "{what}: {error}");
                        // Where a value lies between two, rounding before decides: of the values near zero, where the
                        // spacing is wider than the book, many a code apart.
                        let differ = moments[i].codes.not_equal_tensor(&wanted.codes).sum(Kind::Int64).int64_value(&[]);
                        assert!(differ <= 1 + p.numel() as i64 / 500, "{what}: {differ} codes differ");
                    }
                }
            }
        }
    }

    /// Decades, each cut into twice as many parts as the one below it, as bitsandbytes': what bytes can be looked up
    /// in.
    fn decades(signed: bool) -> CodeBook {
        let decade = |d: i32| {
            let parts = if signed { 1 << d } else { 2 << d };
            (0..parts).map(move |i| (0.1 + 0.9 * (f64::from(i) + 0.5) / f64::from(parts)) * 10f64.powi(d - 6))
        };
        let magnitudes: Vec<f32> = (0..7).flat_map(decade).map(|x| x as f32).collect();
        let negative = magnitudes.iter().filter(|_| signed).map(|m| -m);
        let mut values: Vec<f32> = negative.chain([0.0, 1.0]).chain(magnitudes.iter().copied()).collect();
        values.sort_by(f32::total_cmp);
        CodeBook::new(&values.try_into().unwrap(), Device::Cpu)
    }

    #[test]
    fn looking_up_bytes_changes_no_bit() {
        testing::seed();
        let kernels = || runnable().into_iter().filter(|features| features.has(AVX512));
        let books = [&decades(true), &decades(false)];
        let s = AdamWStep { lr: 3e-2, betas: (0.9, 0.95), eps: 1e-8, weight_decay: 0.1 };
        for size in [&[1][..], &[256], &[700], &[90, 1024]] {
            let start = randn(size);
            let state = |kernels| {
                let moments = [Moment8bit::zeros(size, Device::Cpu), Moment8bit::zeros(size, Device::Cpu)];
                (kernels, start.copy().set_requires_grad(true), moments, Tensor::zeros([], CPU))
            };
            let all: Vec<_> = kernels().map(state).collect();
            for t in 0..6 {
                // Magnitudes from far below the smallest value to the largest; zeros; both signs.
                let g = randn(size) * (randn(size) * f64::from(t)).exp();
                let g = g.where_self(&rand(size).gt(0.1), &g.zeros_like());
                for (kernels, p, moments, step) in &all {
                    let (p, g, step) = ([p.shallow_clone()], [g.shallow_clone()], [step.shallow_clone()]);
                    let moments = [[&moments[0], &moments[1]]];
                    adamw8bit_with(*kernels, &p, &g, &moments, &step, books, s, &Tensor::zeros([], CPU)).unwrap();
                }
                for pair in all.windows(2) {
                    let [(_, p, moments, _), (kernels, other_p, other_moments, _)] = pair else { unreachable!() };
                    let what = format!("{kernels:?} {size:?} step {t}");
                    assert!(p.equal(other_p), "{what}");
                    for (moment, other) in moments.iter().zip(other_moments) {
                        assert!(moment.codes.equal(&other.codes) && moment.absmax.equal(&other.absmax), "{what}");
                    }
                }
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        testing::seed();
        let books = [&book(true), &book(false)];
        let s = AdamWStep { lr: 3e-2, betas: (0.9, 0.95), eps: 1e-8, weight_decay: 0.1 };
        let zeros = |n: i64| Tensor::zeros([n], CPU);
        let call = |p: Tensor, g: Tensor, n: i64| {
            let moment = Moment8bit::zeros(&[n], Device::Cpu);
            let result =
                adamw8bit(&[p], &[g], &[[&moment; 2]], &[Tensor::zeros([], CPU)], books, s, &Tensor::zeros([], CPU));
            result.map_err(|error| error.to_string())
        };
        assert_eq!(call(zeros(300), zeros(300), 300), Ok(()));
        assert!(call(zeros(300), zeros(299), 300).unwrap_err().contains("a gradient"));
        assert!(call(zeros(300), zeros(300), 299).unwrap_err().contains("a moment"));
        assert!(call(zeros(300).to_kind(Kind::Half), zeros(300), 300).unwrap_err().contains("a parameter"));
        assert!(call(Tensor::zeros([20, 30], CPU).tr(), zeros(600), 600).unwrap_err().contains("contiguous"));
    }
}

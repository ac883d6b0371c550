//! Causal attention on the CPU, faster than libtorch's: forward and backward work block by block, without a [T, T]
//! matrix (Dao et al. 2022, "FlashAttention", arXiv 2205.14135).

use tch::{Device, Kind, Tensor};

use super::cpu_features::CpuFeatures;
use super::ffi;
use crate::libtorch::Error;

/// softmax(q kᵀ / sqrt(D)) v, where a query sees the keys up to its own position. Differentiable once. The result and
/// the gradients have the same bits for any number of threads.
///
/// # Shapes
/// `q`: `[B, H, T, D]`; `k`, `v`: `[B, Hkv, T, D]`, where Hkv divides H, and consecutive query heads share one. Returns
/// `[B, H, T, D]`, which lies in memory as `[B, T, H, D]`; so do the gradients. Inputs may have any strides; those that
/// lie as `[B, T, H, D]` are not copied.
///
/// # Dtypes
/// float32, or bfloat16 with scores, softmax and sums in fp32; the same for all three and the result. Autocast does not
/// reach inside.
///
/// # Errors
/// Other dtypes, shapes or devices; an unknown value of `BBT_CPU_KERNELS`.
pub fn causal_attention(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor, Error> {
    causal_attention_with(CpuFeatures::chosen()?, q, k, v)
}

fn causal_attention_with(features: CpuFeatures, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor, Error> {
    check(q, k, v)?;
    let mut out = std::ptr::null_mut();
    // SAFETY: three live tensors of the devices, dtypes and shapes that the kernels expect, and room for one pointer
    // to a new tensor, which we own. This CPU has `features`.
    unsafe {
        ffi::check(ffi::bbt_causal_attention(features.bits(), q.as_ptr(), k.as_ptr(), v.as_ptr(), &mut out))?;
        Ok(Tensor::from_ptr(out))
    }
}

fn check(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<(), Error> {
    let fail = |what: String| Err(Error::Other(format!("causal attention: {what}")));
    let all = [q, k, v];
    if let Some(other) = all.iter().find(|x| x.device() != Device::Cpu) {
        return fail(format!("a tensor is on {:?}; on the CPU only", other.device()));
    }
    let kinds = all.map(Tensor::kind);
    if kinds.iter().any(|&kind| kind != kinds[0]) || !matches!(kinds[0], Kind::Float | Kind::BFloat16) {
        return fail(format!("q, k, v have dtypes {kinds:?}; they must be all Float or all BFloat16"));
    }
    let (qs, ks, vs) = (q.size(), k.size(), v.size());
    let fits = qs.len() == 4
        && ks.len() == 4
        && ks == vs
        && [0, 2, 3].iter().all(|&i| qs[i] == ks[i])
        && ks[1] > 0
        && qs[1] % ks[1] == 0;
    if !fits {
        return fail(format!(
            "q {qs:?}, k {ks:?}, v {vs:?} are not [B, H, T, D] and twice [B, Hkv, T, D], Hkv dividing H"
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::cpu_features::tests::runnable as kernels;
    use crate::kernels::testing;
    use crate::libtorch::{Autocast, AutocastDtype, recompute_in_backward};

    /// q, k, v and the gradient of the output, as views of [B, T, H, D].
    struct Inputs {
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dout: Tensor,
    }

    #[derive(Clone, Copy, Debug)]
    struct Shape {
        b: i64,
        h: i64,
        kv: i64,
        t: i64,
        d: i64,
    }

    impl Inputs {
        fn random(shape: Shape, kind: Kind) -> Self {
            let Shape { b, h, kv, t, d } = shape;
            let new = |heads| testing::randn(&[b, t, heads, d]).to_kind(kind).transpose(1, 2);
            Self { q: new(h), k: new(kv), v: new(kv), dout: new(h) }
        }

        /// The output and the gradients of q, k, v under `f`, in fp64. `f` gets its inputs as `kind`.
        fn run(&self, kind: Kind, f: impl Fn(&Tensor, &Tensor, &Tensor) -> Tensor) -> [Tensor; 4] {
            let [q, k, v] = [&self.q, &self.k, &self.v].map(|x| x.detach().to_kind(kind).set_requires_grad(true));
            let out = f(&q, &k, &v);
            assert_eq!(out.kind(), kind);
            (&out * self.dout.to_kind(kind)).sum(Kind::Double).backward();
            [out.detach(), q.grad(), k.grad(), v.grad()].map(|x| x.to_kind(Kind::Double))
        }

        fn exact(&self) -> [Tensor; 4] {
            self.run(Kind::Double, math)
        }
    }

    fn math(q: &Tensor, k: &Tensor, v: &Tensor) -> Tensor {
        let group = q.size()[1] / k.size()[1];
        let (k, v) = (k.repeat_interleave_self_int(group, 1, None), v.repeat_interleave_self_int(group, 1, None));
        let (t, d) = (q.size()[2], q.size()[3]);
        let hidden = Tensor::ones([t, t], (Kind::Bool, Device::Cpu)).triu(1);
        let scores = q.matmul(&k.transpose(-2, -1)) / (d as f64).sqrt();
        scores.masked_fill(&hidden, f64::NEG_INFINITY).softmax(-1, None::<Kind>).matmul(&v)
    }

    fn sdpa(q: &Tensor, k: &Tensor, v: &Tensor) -> Tensor {
        let group = q.size()[1] != k.size()[1];
        Tensor::scaled_dot_product_attention(q, k, v, None::<Tensor>, 0.0, true, None, group)
    }

    /// The norm of the difference, relative to that of what is expected.
    fn error(actual: &Tensor, expected: &Tensor) -> f64 {
        assert_eq!(actual.size(), expected.size());
        (actual - expected).norm().double_value(&[]) / expected.norm().double_value(&[]).max(1e-30)
    }

    fn shapes() -> Vec<Shape> {
        let mut shapes = Vec::new();
        for (t, b) in [(1, 3), (7, 1), (64, 1), (65, 3), (130, 1), (513, 1)] {
            for d in [32, 40, 64, 128] {
                for (h, kv) in [(3, 3), (4, 2), (2, 1)] {
                    shapes.push(Shape { b, h, kv, t, d });
                }
            }
        }
        // Dimensions below and between the widths of vectors; the original's; so many heads that none is split.
        for (b, h, kv, t, d) in [
            (1, 1, 1, 9, 1),
            (2, 3, 1, 70, 5),
            (1, 2, 2, 100, 17),
            (1, 2, 2, 66, 80),
            (1, 1, 1, 96, 96),
            (5, 5, 5, 65, 16),
        ] {
            shapes.push(Shape { b, h, kv, t, d });
        }
        shapes
    }

    const NAMES: [&str; 4] = ["output", "dq", "dk", "dv"];

    #[test]
    fn fp32_is_the_formula_to_rounding() {
        testing::seed();
        for shape in shapes() {
            let inputs = Inputs::random(shape, Kind::Float);
            let expected = inputs.exact();
            for kernels in kernels() {
                let actual = inputs.run(Kind::Float, |q, k, v| causal_attention_with(kernels, q, k, v).unwrap());
                for ((name, actual), expected) in NAMES.iter().zip(&actual).zip(&expected) {
                    // A single key has weight 1: the gradients of its score are exactly 0.
                    if shape.t == 1 && ["dq", "dk"].contains(name) {
                        assert!(actual.abs().max().double_value(&[]) < 1e-5, "{kernels:?} {shape:?} {name}");
                        continue;
                    }
                    let error = error(actual, expected);
                    assert!(error < 1e-5, "{kernels:?} {shape:?} {name}: {error}");
                }
            }
        }
    }

    #[test]
    fn bf16_is_as_close_as_libtorch() {
        testing::seed();
        for shape in shapes().into_iter().filter(|shape| shape.t > 1) {
            let inputs = Inputs::random(shape, Kind::BFloat16);
            let expected = inputs.exact();
            let theirs = inputs.run(Kind::BFloat16, sdpa);
            for kernels in kernels() {
                let ours = inputs.run(Kind::BFloat16, |q, k, v| causal_attention_with(kernels, q, k, v).unwrap());
                for i in 0..4 {
                    // With few values, chance decides which side rounds better: one unit of bf16 is allowed.
                    let slack = if expected[i].numel() < 4096 { 0.5f64.powi(8) } else { 1e-5 };
                    let (ours, theirs) = (error(&ours[i], &expected[i]), error(&theirs[i], &expected[i]));
                    assert!(
                        ours <= 1.5 * theirs + slack,
                        "{kernels:?} {shape:?} {}: {ours}, libtorch {theirs}",
                        NAMES[i]
                    );
                }
            }
        }
    }

    #[test]
    fn any_strides() {
        testing::seed();
        let shape = Shape { b: 2, h: 4, kv: 2, t: 70, d: 32 };
        let inputs = Inputs::random(shape, Kind::Float);
        let run = |inputs: &Inputs, layout: fn(&Tensor) -> Tensor| {
            inputs.run(Kind::Float, |q, k, v| causal_attention(&layout(q), &layout(k), &layout(v)).unwrap())
        };
        let expected = run(&inputs, Tensor::shallow_clone);
        // Contiguous [B, H, T, D], with T innermost, and every other row of a larger tensor.
        let layouts: [fn(&Tensor) -> Tensor; 3] = [
            Tensor::contiguous,
            |x| x.transpose(2, 3).contiguous().transpose(2, 3),
            |x| x.repeat_interleave_self_int(2, 2, None).slice(2, 0, None, 2),
        ];
        for layout in layouts {
            let actual = run(&inputs, layout);
            assert!(actual.iter().zip(&expected).all(|(a, b)| a.equal(b)));
        }
        // The gradient of a sum has strides of 0.
        let q = inputs.q.detach().set_requires_grad(true);
        causal_attention(&q, &inputs.k, &inputs.v).unwrap().sum(Kind::Float).backward();
        let ones = Inputs { dout: inputs.dout.ones_like(), ..inputs };
        assert!(q.grad().to_kind(Kind::Double).equal(&run(&ones, Tensor::shallow_clone)[1]));
    }

    #[test]
    fn the_result_lies_as_batch_time_heads() {
        testing::seed();
        let inputs = Inputs::random(Shape { b: 2, h: 3, kv: 3, t: 10, d: 16 }, Kind::Float);
        let q = inputs.q.detach().set_requires_grad(true);
        let out = causal_attention(&q, &inputs.k, &inputs.v).unwrap();
        (&out * &inputs.dout).sum(Kind::Float).backward();
        assert!(out.transpose(1, 2).is_contiguous() && q.grad().transpose(1, 2).is_contiguous());
    }

    #[test]
    fn large_scores_stay_finite() {
        testing::seed();
        let shape = Shape { b: 1, h: 2, kv: 2, t: 130, d: 64 };
        for (kind, size) in [(Kind::Float, 1e3), (Kind::Float, 1e15), (Kind::BFloat16, 1e3), (Kind::BFloat16, 1e15)] {
            let inputs = Inputs::random(shape, kind);
            let large = Inputs { q: &inputs.q * size, k: &inputs.k * size, ..inputs };
            for kernels in kernels() {
                let [out, ..] = large.run(kind, |q, k, v| causal_attention_with(kernels, q, k, v).unwrap());
                assert!(out.isfinite().all().int64_value(&[]) == 1, "{kernels:?} {kind:?} {size}");
                // Weights are 0 and 1.
                let difference = error(&out, &large.exact()[0]);
                assert!(size > 1e3 || difference < 0.05, "{kernels:?} {kind:?} {size}: {difference}");
            }
        }
    }

    #[test]
    fn what_is_not_a_number_does_not_get_lost() {
        testing::seed();
        let inputs = Inputs::random(Shape { b: 1, h: 1, kv: 1, t: 70, d: 32 }, Kind::Float);
        let _ = inputs.k.get(0).get(0).get(5).fill_(f64::NAN);
        for kernels in kernels() {
            let out = causal_attention_with(kernels, &inputs.q, &inputs.k, &inputs.v).unwrap();
            let lost = out.isnan().all_dim(-1, false).squeeze();
            assert!(lost.slice(0, 0, 5, 1).any().int64_value(&[]) == 0, "{kernels:?}");
            assert!(lost.slice(0, 5, None, 1).all().int64_value(&[]) == 1, "{kernels:?}");
        }
    }

    #[test]
    fn the_same_bits_with_any_number_of_threads() {
        testing::seed();
        // Fewer heads than tasks, as many, and more.
        let shapes = [(1, 1, 1, 300), (1, 6, 2, 200), (4, 6, 6, 130), (5, 6, 6, 65)];
        let threads = tch::get_num_threads();
        for (b, h, kv, t) in shapes {
            for kind in [Kind::Float, Kind::BFloat16] {
                let inputs = Inputs::random(Shape { b, h, kv, t, d: 64 }, kind);
                let results = [1, 2, 3, 8].map(|n| {
                    tch::set_num_threads(n);
                    inputs.run(kind, |q, k, v| causal_attention(q, k, v).unwrap())
                });
                for other in &results[1..] {
                    assert!(results[0].iter().zip(other).all(|(a, b)| a.equal(b)), "{b} {h} {kv} {t} {kind:?}");
                }
            }
        }
        tch::set_num_threads(threads);
    }

    #[test]
    fn inside_recomputation_and_autocast() {
        testing::seed();
        let inputs = Inputs::random(Shape { b: 2, h: 2, kv: 2, t: 70, d: 32 }, Kind::BFloat16);
        let plain = inputs.run(Kind::BFloat16, |q, k, v| causal_attention(q, k, v).unwrap());
        let recomputed = inputs.run(Kind::BFloat16, |q, k, v| {
            let _region = Autocast::enter(Device::Cpu, AutocastDtype::BFloat16).unwrap();
            let (k, v) = (k.shallow_clone(), v.shallow_clone());
            recompute_in_backward(move |q| causal_attention(q, &k, &v).unwrap(), q).unwrap()
        });
        assert!(plain.iter().zip(&recomputed).all(|(a, b)| a.equal(b)));
        let without_grad = tch::no_grad(|| causal_attention(&inputs.q, &inputs.k, &inputs.v).unwrap());
        assert!(!without_grad.requires_grad() && without_grad.to_kind(Kind::Double).equal(&plain[0]));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        testing::seed();
        let new = |size: &[i64], kind| Tensor::zeros(size, (kind, Device::Cpu));
        let q = new(&[1, 4, 8, 16], Kind::Float);
        for k in [new(&[1, 3, 8, 16], Kind::Float), new(&[1, 4, 9, 16], Kind::Float), new(&[4, 8, 16], Kind::Float)] {
            assert!(causal_attention(&q, &k, &k).unwrap_err().to_string().contains("[B, Hkv, T, D]"));
        }
        let k = new(&[1, 4, 8, 16], Kind::BFloat16);
        assert!(causal_attention(&q, &k, &k).unwrap_err().to_string().contains("BFloat16"));
    }
}

//! The original's rule, with which `make quality` compares, against autograd of Python's torch: activations rounded
//! without a straight-through estimator, weights with the clipped one.

use std::collections::HashMap;
use std::path::Path;

use crate::common::relative_difference;
use bbt::config::{ActSte, QuantConfig, QuantKernel, Ste};
use bbt::libtorch::drawing_alone;
use bbt::quantization::BitLinear;
use tch::{Device, Kind, Tensor, nn};

/// The layer as the original writes it, with nothing detached from the activations.
const ORIGINAL: &str = include_str!("../python/original_rule.py");

#[test]
fn outputs_and_gradients_are_torchs() {
    let (float, dir) = ((Kind::Float, Device::Cpu), tempfile::tempdir().expect("a temporary directory"));
    let x = drawing_alone(|| Tensor::randn([2, 9, 64], float)) * 3.0;
    // A token whose largest magnitude occurs twice, of either sign, and one of zeros.
    let largest = x.get(0).get(1).abs().max() * 2.0;
    x.get(0).get(1).get(5).copy_(&largest);
    x.get(0).get(1).get(40).copy_(&-&largest);
    let _ = x.get(1).get(2).zero_();
    let upstream = drawing_alone(|| Tensor::randn([2, 9, 24], float));

    let vs = nn::VarStore::new(Device::Cpu);
    let quant = QuantConfig { ste: Ste::Clipped, act_ste: ActSte::None, ..QuantConfig::default() };
    let weight = BitLinear::new(vs.root(), 64, 24, false, &quant).weight().expect("trained").detach();

    let [from, to] = ["given.safetensors", "theirs.safetensors"].map(|name| dir.path().join(name));
    Tensor::write_safetensors(&[("x", &x), ("weight", &weight), ("upstream", &upstream)], &from).expect("writes");
    let scripts = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/python");
    crate::common::python(&["-c".as_ref(), ORIGINAL.as_ref(), scripts.as_ref(), from.as_ref(), to.as_ref()]);
    let theirs: HashMap<String, Tensor> = Tensor::read_safetensors(&to).expect("reads").into_iter().collect();

    // Fused kernels have the identity alone: asked for, they leave this to the reference.
    for kernel in [QuantKernel::Auto, QuantKernel::Fused, QuantKernel::Reference] {
        let vs = nn::VarStore::new(Device::Cpu);
        let layer = BitLinear::new(vs.root(), 64, 24, false, &QuantConfig { kernel, ..quant });
        let mut trained = layer.weight().expect("trained").shallow_clone();
        tch::no_grad(|| trained.copy_(&weight));
        let x = x.copy().set_requires_grad(true);
        let y = layer.forward(&x);
        (&y * &upstream).sum(Kind::Float).backward();
        for (name, ours) in [("y", y.detach()), ("x", x.grad()), ("weight", trained.grad())] {
            let difference = relative_difference(&ours, &theirs[name]);
            assert!(difference < 1e-5, "{kernel:?}: {name} differs by {difference}");
        }
        // Of each token one element has a gradient, of the one with two largest both, of zeros none.
        let found = x.grad().ne(0.0).sum_dim_intlist([-1].as_slice(), false, Kind::Int64);
        let expected = Tensor::ones([2, 9], (Kind::Int64, Device::Cpu));
        let _ = expected.get(0).get(1).fill_(2);
        let _ = expected.get(1).get(2).fill_(0);
        assert!(found.equal(&expected), "{kernel:?}: {found}");
    }
}

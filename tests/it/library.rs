//! bbt as a library: what another crate does with the parts on their own.

use bbt::config::{ModelConfig, Order, QuantConfig};
use bbt::data::{ByteDataset, ByteShardDataset, Loader, LoaderOptions, Position};
use bbt::libtorch::drawing_alone;
use bbt::models::BitByteLM;
use bbt::quantization::BitLinear;
use bbt::training::evaluation::inputs_and_targets;
use bbt::training::loss::cross_entropy;
use tch::nn::OptimizerConfig;
use tch::{Device, Kind, Tensor, nn};

#[test]
fn bitlinear_in_a_network_of_ones_own() {
    let vs = nn::VarStore::new(Device::Cpu);
    let quant = QuantConfig::default();
    let first = BitLinear::new(vs.root() / "first", 16, 32, true, &quant);
    let second = BitLinear::new(vs.root() / "second", 32, 1, true, &quant);
    let mut optimizer = nn::Adam::default().build(&vs, 1e-2).expect("an optimizer");
    let x = drawing_alone(|| Tensor::randn([64, 16], (Kind::Float, Device::Cpu)));
    let y = x.narrow(1, 0, 1).sign();
    let loss = || (second.forward(&first.forward(&x).relu()) - &y).square().mean(Kind::Float);
    let before = loss().double_value(&[]);
    for _ in 0..100 {
        optimizer.backward_step(&loss());
    }
    let after = loss().double_value(&[]);
    assert!(after < 0.5 * before, "{before} became {after}");
}

#[test]
fn a_training_loop_of_ones_own() -> Result<(), Box<dyn std::error::Error>> {
    let dir = tempfile::tempdir()?;
    std::fs::write(dir.path().join("shard_00000.bin"), b"to be or not to be, ".repeat(100))?;
    std::fs::write(dir.path().join("shard_00001.bin"), b"that is the question. ".repeat(100))?;

    let dataset = ByteShardDataset::open(dir.path().to_str().ok_or("a UTF-8 path")?)?;
    assert_eq!((dataset.shards().len(), dataset.total_bytes()), (2, 4200));
    let options = LoaderOptions {
        order: Order::Shuffled,
        seed: 7,
        start: Position::default(),
        batch_size: 4,
        grad_accum: 1,
        rank: 0,
        world: 1,
    };
    // 40 steps of windows of 32 bytes.
    let loader = Loader::new(std::sync::Arc::new(dataset), options, vec![32; 40])?;

    let config = ModelConfig { n_layer: 1, d_model: 64, n_head: 2, d_ff: 128, ..ModelConfig::default() };
    let vs = nn::VarStore::new(Device::cuda_if_available());
    let model = BitByteLM::new(&vs.root(), &config, &QuantConfig::default());
    let mut optimizer = nn::AdamW::default().build(&vs, 3e-3)?;
    let mut losses = vec![];
    for batch in loader {
        let batch = batch?;
        let (inputs, targets) = inputs_and_targets(&batch.bytes, batch.rows, vs.device());
        let loss = cross_entropy(&model.forward(&inputs), &targets);
        optimizer.backward_step(&loss);
        losses.push(loss.double_value(&[]));
    }
    assert_eq!(losses.len(), 40);
    assert!(losses[39] < 0.6 * losses[0], "{losses:?}");
    Ok(())
}

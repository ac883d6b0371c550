//! Model FLOPs utilisation: the arithmetic that the model needs by the time that it took, as a part of what the device
//! can do (PaLM, Chowdhery et al. 2022, arXiv 2204.02311, appendix B).

use crate::config::{ModelConfig, Precision};

/// Floating-point operations that training takes for one byte, at sequences of `seq_len` = T bytes: 6 N + 6 L d T, for N
/// parameters and L layers of width d.
///
/// A multiplication with a parameter and its addition are two operations, and backward does them twice more: 6 N, the
/// tied head counted once, as the lookup of an embedding takes none. Scores and weighted values are 4 d T a layer in
/// forward where every byte sees all others, 12 L d T in all; of a causal model's half is not needed. What activation
/// checkpointing computes again does not count, nor does it that forward's products may be of integers.
pub fn flops_per_byte(model: &ModelConfig, seq_len: i64) -> f64 {
    let attention = 12.0 * model.n_layer as f64 * model.d_model as f64 * seq_len as f64 / 2.0;
    6.0 * model.parameters() as f64 + attention
}

/// What NVIDIA's GPUs do by their data sheets, in TFLOP/s: the driver's name without "NVIDIA ", products of bf16 or fp16
/// accumulated in fp32, dense; products of fp32 (libtorch does not use TF32 unless told).
const PEAKS: [(&str, f64, f64); 23] = [
    ("A10", 125.0, 31.2),
    ("A40", 149.7, 37.4),
    ("A100-SXM4-40GB", 312.0, 19.5),
    ("A100-SXM4-80GB", 312.0, 19.5),
    ("A100-PCIE-40GB", 312.0, 19.5),
    ("A100 80GB PCIe", 312.0, 19.5),
    ("H100 80GB HBM3", 989.4, 66.9),
    ("H100 PCIe", 756.0, 51.2),
    ("H100 NVL", 835.0, 60.0),
    ("H200", 989.4, 66.9),
    ("H200 NVL", 835.0, 60.0),
    ("GH200 480GB", 989.4, 66.9),
    ("GH200 144G HBM3e", 989.4, 66.9),
    ("B200", 2250.0, 75.0),
    ("L4", 121.0, 30.3),
    ("L40", 181.0, 90.5),
    ("L40S", 362.0, 91.6),
    ("RTX A6000", 154.8, 38.7),
    ("RTX 6000 Ada Generation", 364.2, 91.1),
    ("GeForce RTX 3090", 71.0, 35.6),
    ("GeForce RTX 4090", 165.2, 82.6),
    ("GeForce RTX 5080", 112.6, 56.3),
    ("GeForce RTX 5090", 209.5, 104.8),
];

/// Peak of the GPU that the driver calls `name`, in TFLOP/s; none where that is not known. Only whole names count: a part
/// of a GPU, or a laptop's, has another peak.
pub fn peak_tflops(name: &str, precision: Precision) -> Option<f64> {
    let name = name.strip_prefix("NVIDIA ").unwrap_or(name);
    let (_, half, full) = PEAKS.into_iter().find(|(known, ..)| *known == name)?;
    Some(match precision {
        Precision::Bf16 | Precision::Fp16 => half,
        Precision::Fp32 => full,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Matrix by matrix, for each byte of one sequence.
    #[test]
    fn the_count_is_that_of_the_products() {
        for (n_layer, d_model, n_head, n_kv_head, d_ff, t) in
            [(24, 1536, 12, None, 4096, 2048), (6, 384, 6, Some(2), 1024, 512), (1, 64, 4, None, 96, 7)]
        {
            let model = ModelConfig { n_layer, d_model, n_head, n_kv_head, d_ff, ..ModelConfig::default() };
            let kv = model.kv_heads() * model.head_dim();
            // Outputs by inputs of every product with a weight.
            let layer = [
                (d_model, d_model),
                (kv, d_model),
                (kv, d_model),
                (d_model, d_model),
                (2 * d_ff, d_model),
                (d_model, d_ff),
            ];
            let weights: i64 =
                layer.iter().map(|(outputs, inputs)| n_layer * outputs * inputs).sum::<i64>() + 256 * d_model;
            let norms = d_model * (2 * n_layer + 1);
            // Of each query with each key up to its own, and back: every head has its part of d_model.
            let pairs: i64 = (1..=t).sum();
            let forward = 2 * t * (weights + norms) + n_layer * 2 * 2 * d_model * pairs;
            let training = (3 * forward) as f64 / t as f64;
            let counted = flops_per_byte(&model, t);
            // T / 2 keys a query, and not (T + 1) / 2.
            let own = (6 * n_layer * d_model) as f64;
            assert!((counted - (training - own)).abs() < 1e-9 * training, "{counted} {training}");
        }
    }

    #[test]
    fn the_count_of_the_original_is_that_of_the_paper() {
        // 680 M parameters, 2048 bytes: 6 · 680,076,… + 6 · 24 · 1536 · 2048.
        let model = ModelConfig::default();
        let n = (24 * (4 * 1536 * 1536 + 3 * 1536 * 4096 + 2 * 1536) + 1536 + 256 * 1536) as f64;
        assert_eq!(flops_per_byte(&model, 2048), 6.0 * n + 452_984_832.0);
    }

    #[test]
    fn only_a_whole_name_has_a_peak() {
        assert_eq!(peak_tflops("NVIDIA H100 80GB HBM3", Precision::Bf16), Some(989.4));
        assert_eq!(peak_tflops("NVIDIA H100 80GB HBM3", Precision::Fp32), Some(66.9));
        assert_eq!(peak_tflops("A100-SXM4-40GB", Precision::Fp16), Some(312.0));
        for other in ["NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GeForce RTX 4090 Laptop GPU", "Tesla T4", ""] {
            assert_eq!(peak_tflops(other, Precision::Bf16), None, "{other}");
        }
    }
}

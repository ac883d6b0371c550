//! Text from a trained model: a KV cache, samplers, bytes as they come.

mod generate;
mod sampler;

pub use generate::Generator;
pub use sampler::{Sampler, Sampling};

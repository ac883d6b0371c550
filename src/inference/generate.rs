//! Generation byte by byte with a KV cache.

use tch::{Device, Kind};

use super::{Sampler, Sampling};
use crate::models::{BitByteLM, KvCache};
use crate::training::evaluation::inputs;

/// An iterator over the bytes that follow a prompt. It ends only where the model's logits are not finite.
#[derive(Debug)]
pub struct Generator<'a> {
    model: &'a BitByteLM,
    device: Device,
    cache: KvCache,
    sampler: Sampler,
    /// What the model has not read yet.
    unread: Vec<u8>,
}

impl<'a> Generator<'a> {
    /// Continues `prompt`, which must not be empty: there is nothing to predict from before a first byte.
    /// `device` is where the model's parameters are.
    pub fn new(model: &'a BitByteLM, device: Device, prompt: &[u8], sampling: Sampling) -> Self {
        let cache = model.new_cache();
        Self { model, device, cache, sampler: Sampler::new(sampling), unread: prompt.to_vec() }
    }
}

impl Iterator for Generator<'_> {
    type Item = u8;

    fn next(&mut self) -> Option<u8> {
        let _no_grad = tch::no_grad_guard();
        let logits = self.model.forward_cached(&inputs(&self.unread, 1, self.device), &mut self.cache);
        let last = logits.select(0, 0).select(0, -1).to_device(Device::Cpu).to_kind(Kind::Float);
        let logits = Vec::<f32>::try_from(last).ok()?;
        // A byte that is out of the question may have minus infinity.
        if logits.iter().any(|&logit| logit.is_nan() || logit == f32::INFINITY) {
            return None;
        }
        let byte = self.sampler.choose(&logits);
        self.unread = vec![byte];
        Some(byte)
    }
}

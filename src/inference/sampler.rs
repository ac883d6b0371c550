//! Choosing the next byte: greedy, temperature, top-k, and top-p (nucleus; Holtzman et al. 2020,
//! arXiv 1904.09751).

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// How the next byte is chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Logits are divided by this; 0: always the most likely byte.
    pub temperature: f64,
    /// Choose among the k most likely bytes only.
    pub top_k: Option<usize>,
    /// Choose among the fewest most likely bytes whose probabilities add up to this.
    pub top_p: Option<f64>,
    /// Seed of the choices.
    pub seed: u64,
}

/// Chooses bytes, one after the other.
#[derive(Debug)]
pub struct Sampler {
    sampling: Sampling,
    rng: StdRng,
}

impl Sampler {
    /// A sampler at the start of its random sequence.
    pub fn new(sampling: Sampling) -> Self {
        Self { sampling, rng: StdRng::seed_from_u64(sampling.seed) }
    }

    /// The next byte, from its 256 logits.
    pub fn choose(&mut self, logits: &[f32]) -> u8 {
        let candidates = candidates(logits, &self.sampling);
        let total: f64 = candidates.iter().map(|(_, p)| p).sum();
        let mut left = self.rng.random::<f64>() * total;
        for (byte, p) in &candidates {
            left -= p;
            if left < 0.0 {
                return *byte;
            }
        }
        candidates.last().map_or(0, |(byte, _)| *byte)
    }
}

/// The bytes to choose among and their unnormalised probabilities, most likely first.
fn candidates(logits: &[f32], sampling: &Sampling) -> Vec<(u8, f64)> {
    let mut order: Vec<(u8, f64)> = (0..=255).zip(logits.iter().map(|&l| f64::from(l))).collect();
    // Stable: of equally likely bytes the smaller comes first, as argmax has it.
    order.sort_by(|a, b| b.1.total_cmp(&a.1));
    if sampling.temperature <= 0.0 {
        order.truncate(1);
    }
    if let Some(k) = sampling.top_k {
        order.truncate(k.max(1));
    }
    let top = order[0].1;
    let temperature = if sampling.temperature > 0.0 { sampling.temperature } else { 1.0 };
    order.iter_mut().for_each(|(_, l)| *l = ((*l - top) / temperature).exp());
    if let Some(p) = sampling.top_p {
        let mut wanted = p * order.iter().map(|(_, p)| p).sum::<f64>();
        let kept = order.iter().take_while(|(_, p)| {
            let take = wanted > 0.0;
            wanted -= p;
            take
        });
        let kept = kept.count().max(1);
        order.truncate(kept);
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Sampling = Sampling { temperature: 1.0, top_k: None, top_p: None, seed: 1 };

    /// Probabilities 1/2, 1/4, 1/8, 1/8 for the bytes 10, 20, 30, 40.
    fn logits() -> Vec<f32> {
        let mut logits = vec![f32::NEG_INFINITY; 256];
        for (byte, p) in [(10, 0.5f32), (20, 0.25), (30, 0.125), (40, 0.125)] {
            logits[byte] = p.ln();
        }
        logits
    }

    fn bytes(sampling: Sampling) -> Vec<u8> {
        candidates(&logits(), &sampling).into_iter().filter(|(_, p)| *p > 0.0).map(|(b, _)| b).collect()
    }

    #[test]
    fn each_rule_keeps_what_it_says() {
        assert_eq!(bytes(PLAIN), [10, 20, 30, 40]);
        assert_eq!(bytes(Sampling { temperature: 0.0, ..PLAIN }), [10]);
        assert_eq!(bytes(Sampling { top_k: Some(2), ..PLAIN }), [10, 20]);
        assert_eq!(bytes(Sampling { top_p: Some(0.6), ..PLAIN }), [10, 20]);
        assert_eq!(bytes(Sampling { top_p: Some(0.1), ..PLAIN }), [10]);
        assert_eq!(bytes(Sampling { top_p: Some(1.0), ..PLAIN }), [10, 20, 30, 40]);
    }

    #[test]
    fn frequencies_follow_the_probabilities() {
        for (temperature, expected) in [(1.0, 0.5), (0.5, 0.25 / (0.25 + 0.0625 + 2.0 * 0.015625))] {
            let mut sampler = Sampler::new(Sampling { temperature, ..PLAIN });
            let n = 20_000;
            let tens = (0..n).filter(|_| sampler.choose(&logits()) == 10).count();
            // Four standard deviations of a binomial share.
            let allowed = 4.0 * (expected * (1.0 - expected) / n as f64).sqrt();
            assert!((tens as f64 / n as f64 - expected).abs() < allowed, "{temperature}: {tens}");
        }
    }

    #[test]
    fn one_seed_gives_one_sequence() {
        let draw = |seed| {
            let mut sampler = Sampler::new(Sampling { seed, ..PLAIN });
            (0..50).map(|_| sampler.choose(&logits())).collect::<Vec<_>>()
        };
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
    }
}

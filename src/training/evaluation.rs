//! Held-out loss: every byte after a document's first, predicted once.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tch::{Device, Kind, Tensor};

use super::loss::{BITS_PER_NAT, cross_entropy_per_byte};
use crate::config::Precision;
use crate::data::ByteDataset;
use crate::libtorch::Error;
use crate::models::BitByteLM;
use crate::utils::device::autocast;

/// How to evaluate.
#[derive(Debug, Clone, Copy)]
pub struct EvalOptions {
    /// Bytes that a window predicts at most, and the most that a prediction sees before it.
    pub seq_len: usize,
    /// Windows start this far apart, up to `seq_len`. Smaller strides give each byte more context (at
    /// least `seq_len - stride` bytes, past a document's start) at seq_len / stride times the cost.
    pub stride: usize,
    /// Precision of the matrix products.
    pub precision: Precision,
}

/// What an evaluation found.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Evaluation {
    /// Mean loss in nats per byte.
    pub loss: f64,
    /// Number of bytes predicted.
    pub bytes: u64,
}

impl Evaluation {
    /// The loss in bits per byte.
    pub fn bits_per_byte(&self) -> f64 {
        self.loss * BITS_PER_NAT
    }

    /// The perplexity per byte: e to the loss.
    pub fn perplexity(&self) -> f64 {
        self.loss.exp()
    }
}

/// One forward pass over part of a document: the input is bytes `start .. start + len`, each predicting
/// the next; the predictions from `first` on count.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Window {
    start: usize,
    len: usize,
    first: usize,
}

/// The windows of a document of `n` bytes, which together count each of its n - 1 predictions once.
fn windows(n: usize, seq_len: usize, stride: usize) -> impl Iterator<Item = Window> {
    let predictions = n.saturating_sub(1);
    let mut done = 0;
    let mut start = 0;
    std::iter::from_fn(move || {
        if done >= predictions {
            return None;
        }
        let len = seq_len.min(predictions - start);
        let window = Window { start, len, first: done - start };
        done = start + len;
        start += stride;
        Some(window)
    })
}

/// Bytes of input in one batch of windows.
const BATCH_BYTES: usize = 8192;

/// The mean loss of `model` over `documents` (each at least two bytes to count), on `device`, where its
/// parameters are. `progress` is told the number of bytes predicted so far.
///
/// # Errors
/// libtorch's own.
pub fn evaluate(
    model: &BitByteLM,
    documents: &[&[u8]],
    options: EvalOptions,
    device: Device,
    progress: impl FnMut(u64),
) -> Result<Evaluation, Error> {
    Ok(evaluate_part(model, documents, options, device, (0, 1), progress)?.total())
}

/// What one rank found.
#[derive(Debug, Clone, PartialEq)]
pub struct PartialEvaluation {
    /// Sum of the losses of each window in nats; 0 for those of other ranks. Added over ranks these are the
    /// sums that one rank alone finds, to the last bit.
    pub sums: Vec<f64>,
    /// Number of bytes that each window counts, whichever rank computes it.
    pub counts: Vec<u64>,
    /// Number of bytes predicted by all ranks.
    pub bytes: u64,
}

impl PartialEvaluation {
    /// The evaluation, once `sums` are those of all ranks.
    pub fn total(&self) -> Evaluation {
        let total: f64 = self.sums.iter().sum();
        Evaluation { loss: if self.bytes == 0 { f64::NAN } else { total / self.bytes as f64 }, bytes: self.bytes }
    }

    /// A 95 % interval of the mean loss in nats per byte, by the percentile bootstrap (Efron 1979): `resamples` times as
    /// many windows as there are are drawn with replacement, and the interval is from the 2.5th to the 97.5th percentile
    /// of their mean losses (percentiles interpolated as NumPy does). The same `seed` gives the same interval.
    ///
    /// It says how far the loss would differ on other text of the kind, as far as the windows are independent: where they
    /// overlap (a stride below the sequence length) or text repeats itself, it is too narrow.
    pub fn bootstrap(&self, resamples: usize, seed: u64) -> (f64, f64) {
        let windows = self.sums.len();
        if windows == 0 || resamples == 0 {
            return (f64::NAN, f64::NAN);
        }
        let mut random = StdRng::seed_from_u64(seed);
        let mut means: Vec<f64> = (0..resamples)
            .map(|_| {
                let (mut sum, mut count) = (0.0, 0);
                for _ in 0..windows {
                    let drawn = random.random_range(0..windows);
                    sum += self.sums[drawn];
                    count += self.counts[drawn];
                }
                sum / count as f64
            })
            .collect();
        means.sort_by(f64::total_cmp);
        (percentile(&means, 0.025), percentile(&means, 0.975))
    }
}

/// The value below which the fraction `at` of `sorted` lies, interpolated between neighbours.
fn percentile(sorted: &[f64], at: f64) -> f64 {
    let place = at * (sorted.len() - 1) as f64;
    let (below, above) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
    below + (above - below) * place.fract()
}

/// The part of [`evaluate`] that falls to one of several ranks, `part` being its number and theirs.
///
/// # Errors
/// libtorch's own.
pub fn evaluate_part(
    model: &BitByteLM,
    documents: &[&[u8]],
    options: EvalOptions,
    device: Device,
    part: (usize, usize),
    mut progress: impl FnMut(u64),
) -> Result<PartialEvaluation, Error> {
    let _no_grad = tch::no_grad_guard();
    let seq_len = options.seq_len.max(1);
    let stride = options.stride.clamp(1, seq_len);
    let rows = (BATCH_BYTES / seq_len).max(1);
    let mut found = PartialEvaluation { sums: vec![], counts: vec![], bytes: 0 };
    let mut batches = 0;
    for document in documents {
        let mut pending = windows(document.len(), seq_len, stride).peekable();
        while let Some(window) = pending.next() {
            let mut batch = vec![window];
            while batch.len() < rows
                && let Some(next) = pending.next_if(|next| next.len == window.len)
            {
                batch.push(next);
            }
            let own = batches % part.1.max(1) == part.0;
            batches += 1;
            if own {
                let text: Vec<u8> = batch.iter().flat_map(|w| &document[w.start..=w.start + w.len]).copied().collect();
                let (inputs, targets) = inputs_and_targets(&text, batch.len(), device);
                let logits = autocast(device, options.precision, || model.forward(&inputs))?;
                let losses = cross_entropy_per_byte(&logits, &targets);
                for (row, window) in (0..).zip(&batch) {
                    let counted = losses.get(row).narrow(0, window.first as i64, (window.len - window.first) as i64);
                    found.sums.push(counted.sum(Kind::Double).double_value(&[]));
                }
            } else {
                found.sums.resize(found.sums.len() + batch.len(), 0.0);
            }
            found.counts.extend(batch.iter().map(|w| (w.len - w.first) as u64));
            found.bytes += batch.iter().map(|w| (w.len - w.first) as u64).sum::<u64>();
            progress(found.bytes);
        }
    }
    Ok(found)
}

/// Pieces that part of a data set is taken in.
const PIECES: u64 = 16;

/// The shards of `set`; or, where a `limit` is less than all of it, about so many bytes of it in 16 pieces
/// spread evenly: its beginning alone may be unlike the rest. Each piece is a document of its own.
pub fn sample(set: &dyn ByteDataset, limit: Option<u64>) -> Vec<&[u8]> {
    let whole: Vec<&[u8]> = set.shards().iter().map(|shard| shard.bytes()).collect();
    let total = set.total_bytes();
    let Some(limit) = limit.filter(|&limit| limit < total) else { return whole };
    let pieces = PIECES.min(limit / 2).max(1);
    let length = limit / pieces;
    let starts = (0..pieces).map(|i| (u128::from(i) * u128::from(total - length) / u128::from(PIECES)) as u64);
    let piece = |start: u64| {
        let mut before = 0;
        whole.iter().find_map(|shard| {
            let at = start - before;
            let end = (at + length).min(shard.len() as u64);
            before += shard.len() as u64;
            (at < shard.len() as u64).then(|| &shard[at as usize..end as usize])
        })
    };
    starts.filter_map(piece).collect()
}

/// `rows` rows of bytes as tokens: `[rows, width]` int64 on `device`.
pub fn inputs(text: &[u8], rows: usize, device: Device) -> Tensor {
    // As bytes over the bus, widened on the device.
    let width = text.len() / rows.max(1);
    let text = Tensor::from_slice(text).view([rows as i64, width as i64]);
    let text = match device {
        // Only out of pinned memory does the device copy by itself, and the host need not wait.
        Device::Cuda(_) => text.pin_memory(device).to_device_(device, Kind::Uint8, true, false),
        _ => text.to_device(device),
    };
    text.to_kind(Kind::Int64)
}

/// Splits `rows` rows of T + 1 bytes into what a model reads and what it is to predict: `[rows, T]` int64
/// each, on `device`.
pub fn inputs_and_targets(text: &[u8], rows: usize, device: Device) -> (Tensor, Tensor) {
    let tokens = inputs(text, rows, device);
    let length = tokens.size()[1] - 1;
    (tokens.narrow(1, 0, length), tokens.narrow(1, 1, length))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_after_the_first_counts_once() {
        for n in [0usize, 1, 2, 5, 16, 17, 33, 100] {
            for (seq_len, stride) in [(1, 1), (4, 4), (4, 1), (16, 16), (16, 5), (200, 7)] {
                let mut counted = vec![];
                for w in windows(n, seq_len, stride) {
                    assert!(w.len <= seq_len && w.start + w.len < n);
                    for p in w.start + w.first..w.start + w.len {
                        counted.push(p);
                        // Past the start of the document each prediction sees enough.
                        assert!(p - w.start >= (seq_len - stride).min(p), "{n} {seq_len} {stride}");
                    }
                }
                assert!(counted.into_iter().eq(0..n.saturating_sub(1)), "{n} {seq_len} {stride}");
            }
        }
    }

    #[test]
    fn a_sample_is_spread_over_all_shards_and_a_large_limit_takes_everything() {
        let dir = tempfile::tempdir().unwrap();
        for shard in 0..4u8 {
            std::fs::write(dir.path().join(format!("shard_{shard}.bin")), vec![shard; 1000]).unwrap();
        }
        let set = crate::data::open(dir.path().to_str().unwrap()).unwrap();
        let pieces = sample(set.as_ref(), Some(320));
        assert_eq!((pieces.len(), pieces[0].len()), (16, 20));
        assert!(pieces.iter().map(|p| p.len()).sum::<usize>() <= 320);
        for shard in 0..4 {
            assert!(pieces.iter().filter(|p| p[0] == shard).count() >= 3);
        }
        for limit in [None, Some(4000), Some(1 << 40)] {
            assert_eq!(sample(set.as_ref(), limit).iter().map(|p| p.len()).collect::<Vec<_>>(), [1000; 4]);
        }
        assert_eq!(sample(set.as_ref(), Some(2)).len(), 1);
    }

    fn of_windows(sums: &[f64], counts: &[u64]) -> PartialEvaluation {
        PartialEvaluation { sums: sums.to_vec(), counts: counts.to_vec(), bytes: counts.iter().sum() }
    }

    #[test]
    fn percentiles_are_numpys() {
        // np.percentile([1, 2, 4, 8, 16], [2.5, 50, 97.5]), and of one value.
        let sorted = [1.0, 2.0, 4.0, 8.0, 16.0];
        let found = [0.025, 0.5, 0.975].map(|at| percentile(&sorted, at));
        assert!(found.iter().zip([1.1, 4.0, 15.2]).all(|(a, b): (&f64, f64)| (a - b).abs() < 1e-12), "{found:?}");
        assert_eq!(percentile(&[3.0], 0.975), 3.0);
    }

    #[test]
    fn the_bootstrap_finds_the_binomials_quantiles() {
        // Of n windows a fraction has loss 1 and the others 0: the number of ones drawn is binomial.
        for (windows, ones) in [(40usize, 12usize), (100, 50), (200, 10)] {
            let sums: Vec<f64> = (0..windows).map(|i| if i < ones { 8.0 } else { 0.0 }).collect();
            let (low, high) = of_windows(&sums, &vec![8; windows]).bootstrap(20_000, 1);
            let p = ones as f64 / windows as f64;
            let mut probability = (1.0 - p).powi(windows as i32);
            let (mut below, mut quantiles) = (probability, [0usize; 2]);
            for k in 1..=windows {
                for (quantile, at) in quantiles.iter_mut().zip([0.025, 0.975]) {
                    if below < at {
                        *quantile = k;
                    }
                }
                probability *= p / (1.0 - p) * (windows - k + 1) as f64 / k as f64;
                below += probability;
            }
            // 20,000 draws may miss by a window.
            let window = 1.001 / windows as f64;
            for (found, exact) in [low, high].into_iter().zip(quantiles) {
                assert!((found - exact as f64 / windows as f64).abs() < window, "{low} {high}: {quantiles:?}");
            }
        }
    }

    #[test]
    fn the_bootstrap_weighs_windows_by_their_bytes_and_is_seeded() {
        // Equal losses per byte, whatever the windows' lengths: nothing to be unsure of.
        let (low, high) = of_windows(&[2.0, 20.0, 6.0], &[1, 10, 3]).bootstrap(500, 7);
        assert!((low - 2.0).abs() < 1e-12 && (high - 2.0).abs() < 1e-12, "{low} {high}");
        // Two windows: a quarter of the draws each is one of them twice, so the ends are those.
        let two = of_windows(&[1.0, 30.0], &[1, 10]);
        assert_eq!(two.bootstrap(2000, 3), (1.0, 3.0));
        let many = of_windows(&(0..50).map(|i| f64::from(i * i % 17)).collect::<Vec<_>>(), &[3; 50]);
        assert_eq!(many.bootstrap(300, 5), many.bootstrap(300, 5));
        assert_ne!(many.bootstrap(300, 5), many.bootstrap(300, 6));
        let (low, high) = many.bootstrap(300, 5);
        assert!(low < many.total().loss && many.total().loss < high);
    }

    #[test]
    fn without_overlap_windows_are_chunks() {
        let all: Vec<_> = windows(11, 4, 4).map(|w| (w.start, w.len, w.first)).collect();
        assert_eq!(all, [(0, 4, 0), (4, 4, 0), (8, 2, 0)]);
    }
}

//! Which window is trained on when.
//!
//! Every order is a pure function of (seed, epoch, index), so a place in it is a few numbers, and resuming
//! costs nothing. The shuffle is a Feistel network over the window numbers (Luby and Rackoff, "How to
//! construct pseudorandom permutations from pseudorandom functions", 1988), made to fit any count by cycle
//! walking (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002); its random numbers are
//! SplitMix64's (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014). They are
//! written out here, since a library's next version may not shuffle alike, and a run must resume alike.

use serde::{Deserialize, Serialize};

use super::{ByteDataset, DataError, Windows};
use crate::config::Order;

impl Order {
    /// The windows that this order goes through.
    ///
    /// # Errors
    /// `seq_len` 0, or a shard shorter than a window.
    pub fn windows(self, dataset: &dyn ByteDataset, seq_len: usize) -> Result<Windows, DataError> {
        match self {
            Self::Shuffled | Self::Sequential => dataset.windows(seq_len),
            Self::Random => dataset.windows_at_every_byte(seq_len),
        }
    }

    /// The number, among `count` windows, of the one at `position`.
    pub(super) fn window(self, seed: u64, position: Position, count: u64) -> u64 {
        let key = splitmix64(splitmix64(seed, 0), position.epoch);
        match self {
            Self::Shuffled => Permutation::new(count, key).apply(position.next % count),
            Self::Random => ((u128::from(splitmix64(key, position.next)) * u128::from(count)) >> 64) as u64,
            Self::Sequential => position.next % count,
        }
    }

    /// The position `entries` further on, over `count` windows.
    pub(super) fn advance(self, position: Position, entries: u64, count: u64) -> Position {
        let epoch_len = match self {
            Self::Shuffled | Self::Sequential => count,
            Self::Random => u64::MAX,
        };
        let next = u128::from(position.next) + u128::from(entries);
        let epochs = (next / u128::from(epoch_len)) as u64;
        let next = (next % u128::from(epoch_len)) as u64;
        Position { epoch: position.epoch.wrapping_add(epochs), next, ..position }
    }
}

/// A place in an order, between two entries, as a training checkpoint holds it. The same for all ranks;
/// [`Position::default`] is the start of a run.
///
/// It counts windows, not batches: a run may go on with another batch size or number of ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Position {
    /// Passes over the data that have ended.
    pub epoch: u64,
    /// Entries of this pass that have been taken.
    pub next: u64,
    /// Sequence length of this pass, in bytes; 0 before the first.
    pub seq_len: u64,
    /// Number of windows that this pass goes through; 0 before the first.
    pub windows: u64,
}

impl Position {
    /// The same place where `windows` are those of this pass. Other windows (another sequence length, other
    /// data) are another pass: the one begun ends, and the next epoch starts with its first entry.
    pub(super) fn on(self, windows: &Windows) -> Self {
        let (seq_len, count) = (windows.seq_len() as u64, windows.count());
        if (self.seq_len, self.windows) == (seq_len, count) {
            return self;
        }
        let epoch = self.epoch.wrapping_add(u64::from(self.next > 0));
        Self { epoch, next: 0, seq_len, windows: count }
    }
}

/// Output `index` of a SplitMix64 generator that starts at `state`.
fn splitmix64(state: u64, index: u64) -> u64 {
    let z = state.wrapping_add(index.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Rounds of the Feistel network. Four suffice for random round functions on large domains; small domains,
/// where a round's function has few values, need more to look shuffled.
const ROUNDS: usize = 8;

/// A pseudorandom permutation of `0 .. count` in constant memory.
struct Permutation {
    count: u64,
    /// The network permutes numbers of twice so many bits: the least even number of bits that holds `count`.
    half_bits: u32,
    keys: [u64; ROUNDS],
}

impl Permutation {
    fn new(count: u64, key: u64) -> Self {
        let bits = u64::BITS - count.saturating_sub(1).leading_zeros();
        let keys = std::array::from_fn(|round| splitmix64(key, round as u64));
        Self { count, half_bits: bits.div_ceil(2).max(1), keys }
    }

    /// The image of `index`, which must be below `count`.
    fn apply(&self, index: u64) -> u64 {
        // The network's range is less than four times `count`. Following its cycle from a number below
        // `count` to the next such number is a permutation of those numbers, and takes under four turns on
        // average.
        let mut x = self.network(index);
        while x >= self.count {
            x = self.network(x);
        }
        x
    }

    fn network(&self, x: u64) -> u64 {
        let mask = (1 << self.half_bits) - 1;
        let (mut left, mut right) = (x >> self.half_bits, x & mask);
        for &key in &self.keys {
            (left, right) = (right, left ^ (splitmix64(key, right) & mask));
        }
        left << self.half_bits | right
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn permutation(count: u64, key: u64) -> Vec<u64> {
        let permutation = Permutation::new(count, key);
        (0..count).map(|index| permutation.apply(index)).collect()
    }

    fn is_bijective(mut images: Vec<u64>) -> bool {
        let count = images.len() as u64;
        images.sort_unstable();
        images.into_iter().eq(0..count)
    }

    /// Pearson's statistic of counts that should be equal.
    fn chi_square(counts: &[u64]) -> f64 {
        let mean = counts.iter().sum::<u64>() as f64 / counts.len() as f64;
        counts.iter().map(|&n| (n as f64 - mean).powi(2) / mean).sum()
    }

    #[test]
    fn splitmix64_matches_its_published_outputs() {
        // From Vigna's splitmix64.c, seeded with 1234567.
        let outputs: [u64; 3] = std::array::from_fn(|index| splitmix64(1234567, index as u64));
        assert_eq!(outputs, [6457827717110365317, 3203168211198807973, 9817491932198370423]);
    }

    #[test]
    fn every_count_up_to_300_is_permuted() {
        for count in 1..=300 {
            assert!(is_bijective(permutation(count, count ^ 5)), "{count}");
        }
        for count in [4093, 4096, 4097, 65537, 104729] {
            assert!(is_bijective(permutation(count, 9)), "{count}");
        }
    }

    #[test]
    fn the_largest_count_is_permuted() {
        for count in [u64::MAX, 1 << 63, (1 << 62) + 1] {
            let permutation = Permutation::new(count, 3);
            let images = [0, 1, count / 2, count - 1].map(|index| permutation.apply(index));
            assert!(images.iter().all(|&image| image < count));
            assert!((0..4).all(|i| (0..i).all(|j| images[i] != images[j])));
        }
    }

    proptest! {
        #[test]
        fn any_count_and_key_is_permuted(count in 1u64..5000, key: u64) {
            prop_assert!(is_bijective(permutation(count, key)));
        }

        #[test]
        fn advancing_is_additive(
            count in 1u64..50, next in 0u64..50, a in 0u64..200, b in 0u64..200, index in 0usize..3,
        ) {
            let order = [Order::Shuffled, Order::Random, Order::Sequential][index];
            let start = Position { next: next % count, ..Position::default() };
            let twice = order.advance(order.advance(start, a, count), b, count);
            prop_assert_eq!(twice, order.advance(start, a + b, count));
            let next = start.next + a + b;
            let expected = if order == Order::Random { (0, next) } else { (next / count, next % count) };
            prop_assert_eq!((twice.epoch, twice.next), expected);
        }

        #[test]
        fn no_position_panics(epoch: u64, next: u64, entries: u64, count in 1u64.., seed: u64) {
            let position = Position { epoch, next, seq_len: 1, windows: count };
            for order in [Order::Shuffled, Order::Random, Order::Sequential] {
                prop_assert!(order.window(seed, position, count) < count);
                order.advance(position, entries, count);
            }
        }
    }

    #[test]
    fn it_looks_shuffled() {
        let count = 10_000;
        let images = permutation(count, 42);
        // Of a random permutation: displacement n/3 on average, one fixed point, two neighbours kept together
        // in one direction or the other.
        let displacement: u64 = images.iter().enumerate().map(|(i, &x)| x.abs_diff(i as u64)).sum();
        assert!((3100..3570).contains(&(displacement / count)), "{}", displacement / count);
        assert!(images.iter().enumerate().filter(|&(i, &x)| x == i as u64).count() < 8);
        assert!(images.windows(2).filter(|pair| pair[0].abs_diff(pair[1]) == 1).count() < 12);
        // The first tenth of the pass spreads over the whole data: 10 bins of 100 expected (99.99 % quantile
        // of chi-square at 9 degrees of freedom: 33.7).
        let mut bins = [0; 10];
        images[..1000].iter().for_each(|x| bins[(x / 1000) as usize] += 1);
        assert!(chi_square(&bins) < 33.7, "{bins:?}");
    }

    #[test]
    fn every_window_is_as_likely_to_come_first() {
        // 99.99 % quantiles of chi-square at count - 1 degrees of freedom.
        for (count, quantile) in [(2u64, 15.2), (3, 18.5), (5, 23.6), (10, 33.8)] {
            let mut counts = vec![0; count as usize];
            for seed in 0..2000 {
                let first = Order::Shuffled.window(seed, Position::default(), count);
                counts[first as usize] += 1;
            }
            assert!(chi_square(&counts) < quantile, "{count}: {counts:?}");
        }
    }

    #[test]
    fn random_draws_are_uniform() {
        let mut counts = vec![0; 16];
        for next in 0..16_000 {
            let position = Position { next, ..Position::default() };
            counts[Order::Random.window(7, position, 16) as usize] += 1;
        }
        // 99.99 % quantile of chi-square at 15 degrees of freedom.
        assert!(chi_square(&counts) < 44.3, "{counts:?}");
    }

    #[test]
    fn seeds_and_epochs_differ_and_stay() {
        let pass = |order: Order, seed, epoch| -> Vec<u64> {
            (0..8).map(|next| order.window(seed, Position { epoch, next, ..Position::default() }, 8)).collect()
        };
        for order in [Order::Shuffled, Order::Random] {
            assert_ne!(pass(order, 0, 0), pass(order, 1, 0));
            assert_ne!(pass(order, 0, 0), pass(order, 0, 1));
        }
        // Pinned: were these to change, a run would no longer resume where it stopped.
        assert_eq!(pass(Order::Shuffled, 1234, 0), [6, 1, 3, 2, 7, 4, 0, 5]);
        assert_eq!(pass(Order::Shuffled, 1234, 1), [0, 4, 7, 1, 2, 5, 6, 3]);
        assert_eq!(pass(Order::Random, 1234, 0), [2, 2, 2, 4, 1, 2, 7, 0]);
    }

    #[test]
    fn other_windows_end_the_pass() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("text");
        std::fs::write(&path, [0; 101]).unwrap();
        let dataset = crate::data::ByteStreamDataset::open(&path).unwrap();
        let (ten, five) = (dataset.windows(10).unwrap(), dataset.windows(5).unwrap());
        let start = Position::default().on(&ten);
        assert_eq!(start, Position { epoch: 0, next: 0, seq_len: 10, windows: 10 });
        assert_eq!(start.on(&five), Position { epoch: 0, next: 0, seq_len: 5, windows: 20 });
        let later = Position { next: 3, ..start };
        assert_eq!(later.on(&ten), later);
        assert_eq!(later.on(&five), Position { epoch: 1, next: 0, seq_len: 5, windows: 20 });
    }

    #[test]
    fn names_are_lowercase() {
        assert_eq!(serde_json::to_string(&Order::Shuffled).unwrap(), "\"shuffled\"");
        assert_eq!(serde_json::from_str::<Order>("\"sequential\"").unwrap(), Order::Sequential);
        let position = Position { epoch: 1, next: 2, seq_len: 3, windows: 4 };
        let text = serde_json::to_string(&position).unwrap();
        assert_eq!(serde_json::from_str::<Position>(&text).unwrap(), position);
    }
}

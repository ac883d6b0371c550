//! Where the training windows of a dataset lie.

use std::ops::Range;

use super::{DataError, Shard};

/// The windows of a dataset at one sequence length, numbered over all shards in file order.
///
/// A window of sequence length T is T + 1 bytes: the first T are the input, the last T the targets. With a
/// stride of T, window w of a shard is its bytes `[T w, T w + T + 1)`, and a shard of n bytes has (n - 1) / T.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Windows {
    seq_len: usize,
    stride: usize,
    /// For each shard, the number of windows up to its end.
    ends: Vec<u64>,
}

impl Windows {
    /// The windows that start every `stride` bytes of each shard.
    ///
    /// # Errors
    /// `seq_len` 0, or a shard shorter than a window.
    pub(super) fn new(shards: &[Shard], seq_len: usize, stride: usize) -> Result<Self, DataError> {
        if seq_len == 0 || stride == 0 {
            return Err(DataError::invalid("seq_len", "a window must predict at least one byte"));
        }
        if let Some(short) = shards.iter().find(|shard| shard.bytes().len() <= seq_len) {
            let (path, bytes) = (short.path().into(), short.bytes().len() as u64);
            return Err(DataError::ShortShard { path, bytes, seq_len });
        }
        Ok(Self::over(shards.iter().map(|shard| shard.bytes().len()), seq_len, stride))
    }

    /// As [`Windows::new`], from the shards' sizes, each more than `seq_len`.
    fn over(sizes: impl Iterator<Item = usize>, seq_len: usize, stride: usize) -> Self {
        let ends = sizes.scan(0, |total, size| {
            *total += ((size - 1 - seq_len) / stride + 1) as u64;
            Some(*total)
        });
        Self { seq_len, stride, ends: ends.collect() }
    }

    /// Bytes predicted per window.
    pub fn seq_len(&self) -> usize {
        self.seq_len
    }

    /// Number of windows: at least one.
    pub fn count(&self) -> u64 {
        self.ends.last().copied().unwrap_or(0)
    }

    /// The shard and the bytes in it of window `index`; none past the last.
    pub fn locate(&self, index: u64) -> Option<(usize, Range<usize>)> {
        let shard = self.ends.partition_point(|&end| end <= index);
        if shard == self.ends.len() {
            return None;
        }
        let before = if shard == 0 { 0 } else { self.ends[shard - 1] };
        let start = (index - before) as usize * self.stride;
        Some((shard, start..start + self.seq_len + 1))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn windows_stay_in_their_shard_and_predict_each_byte_once(
            sizes in prop::collection::vec(1usize..200, 1..8),
            seq_len in 1usize..20,
        ) {
            let sizes: Vec<usize> = sizes.into_iter().map(|size| size + seq_len).collect();
            let windows = Windows::over(sizes.iter().copied(), seq_len, seq_len);
            prop_assert_eq!(windows.count(), sizes.iter().map(|n| ((n - 1) / seq_len) as u64).sum::<u64>());
            let mut index = 0;
            for (shard, &size) in sizes.iter().enumerate() {
                for w in 0..(size - 1) / seq_len {
                    let expected = (shard, seq_len * w..seq_len * w + seq_len + 1);
                    prop_assert!(expected.1.end <= size);
                    prop_assert_eq!(windows.locate(index), Some(expected));
                    index += 1;
                }
            }
            prop_assert_eq!(windows.locate(index), None);
            prop_assert_eq!(windows.locate(u64::MAX), None);
        }

        #[test]
        fn stride_one_gives_every_offset(sizes in prop::collection::vec(1usize..50, 1..5), seq_len in 1usize..20) {
            let sizes: Vec<usize> = sizes.into_iter().map(|size| size + seq_len).collect();
            let windows = Windows::over(sizes.iter().copied(), seq_len, 1);
            let found: Vec<_> = (0..windows.count()).map(|index| windows.locate(index).unwrap()).collect();
            let expected: Vec<_> = sizes.iter().enumerate()
                .flat_map(|(shard, &size)| (0..size - seq_len).map(move |at| (shard, at..at + seq_len + 1)))
                .collect();
            prop_assert_eq!(found, expected);
        }
    }
}

//! What packing puts where, from the documents' sizes alone: which go to validation, where shards end.

/// A document, or the part `start .. end` of its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    /// Its number among the documents.
    pub document: usize,
    pub start: u64,
    pub end: u64,
}

impl Piece {
    pub fn len(&self) -> u64 {
        self.end - self.start
    }
}

/// The pieces of the two splits, each in the order of the documents.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Split {
    pub train: Vec<Piece>,
    pub val: Vec<Piece>,
    /// The document that both splits have a part of.
    pub divided: Option<usize>,
}

/// Deals documents of `sizes` (each above 0) to validation so that it gets the fraction `val_frac`, 0 to 0.5,
/// of the bytes: its share.
///
/// Documents go whole, from the largest to the smallest, each to the side that brings validation's bytes
/// nearest to its share of the bytes dealt so far; so validation has documents of all sizes, and the small
/// ones even it out. What would exceed its share stays in training. Where that leaves more than half of the
/// share open, as a single document does, validation gets the rest of it from the end of the last document
/// that is long enough. So it holds between half its share and all of it.
pub(super) fn split(sizes: &[u64], val_frac: f64) -> Split {
    let share = (val_frac * sizes.iter().sum::<u64>() as f64).round() as u64;
    let mut largest_first: Vec<usize> = (0..sizes.len()).collect();
    largest_first.sort_by_key(|&document| std::cmp::Reverse(sizes[document]));
    let mut is_val = vec![false; sizes.len()];
    let (mut dealt, mut val_bytes) = (0, 0);
    for document in largest_first {
        let size = sizes[document];
        dealt += size;
        let nearer = val_bytes as f64 + size as f64 / 2.0 < val_frac * dealt as f64;
        if nearer && val_bytes + size <= share {
            is_val[document] = true;
            val_bytes += size;
        }
    }

    let whole = |document: usize| Piece { document, start: 0, end: sizes[document] };
    let (mut val, mut train): (Vec<_>, Vec<_>) = (0..sizes.len()).map(whole).partition(|piece| is_val[piece.document]);
    let open = share - val_bytes;
    let mut divided = None;
    if open > share / 2
        && let Some(last) = train.iter_mut().rfind(|piece| piece.end > open)
    {
        last.end -= open;
        divided = Some(last.document);
        let tail = Piece { document: last.document, start: last.end, end: last.end + open };
        val.insert(val.partition_point(|piece| piece.document < tail.document), tail);
    }
    Split { train, val, divided }
}

/// The sizes of the shards that hold units of `sizes` (documents, each with the separator behind it) one
/// after another.
///
/// Shards end where a document does, unless it is longer than `shard_size`. They hold from half of
/// `shard_size` to one and a half times as much; the last, which takes a short rest in, up to twice as much.
/// Less than half in all makes one shard.
pub(super) fn shard_sizes(sizes: impl IntoIterator<Item = u64>, shard_size: u64) -> Vec<u64> {
    let half = shard_size / 2;
    let most = shard_size.saturating_add(half);
    let mut shards = Vec::new();
    let mut filled = 0;
    for size in sizes {
        if filled >= half && filled + size > shard_size {
            shards.push(filled);
            filled = 0;
        }
        filled += size;
        while filled > most {
            shards.push(shard_size);
            filled -= shard_size;
        }
        if filled >= shard_size {
            shards.push(filled);
            filled = 0;
        }
    }
    match shards.last_mut() {
        Some(last) if filled < half => *last += filled,
        _ if filled > 0 => shards.push(filled),
        _ => {}
    }
    shards
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bytes(pieces: &[Piece]) -> u64 {
        pieces.iter().map(Piece::len).sum()
    }

    #[test]
    fn whole_documents_where_they_fit() {
        let split = split(&[10; 20], 0.1);
        assert_eq!((split.train.len(), split.val.len(), split.divided), (18, 2, None));
        // A large document among small ones stays in training.
        let split = super::split(&[1000, 10, 10, 10, 10, 10, 10, 10, 10, 10, 10], 0.05);
        assert_eq!((bytes(&split.val), split.train[0].len(), split.divided), (50, 1000, None));
        let split = super::split(&[7, 8], 0.0);
        assert_eq!((split.train.len(), split.val.len(), split.divided), (2, 0, None));
    }

    #[test]
    fn else_the_end_of_the_last() {
        let whole = |document, end| Piece { document, start: 0, end };
        let divided = |document, at, end| (Piece { document, start: 0, end: at }, Piece { document, start: at, end });
        let (head, tail) = divided(0, 900, 1000);
        assert_eq!(split(&[1000], 0.1), Split { train: vec![head], val: vec![tail], divided: Some(0) });
        let (head, tail) = divided(1, 710, 900);
        assert_eq!(
            split(&[900, 900], 0.1055),
            Split { train: vec![whole(0, 900), head], val: vec![tail], divided: Some(1) }
        );
        // All small ones are far from enough.
        let (head, tail) = divided(0, 80, 100);
        let (train, val) = (vec![head], vec![tail, whole(1, 1), whole(2, 1)]);
        assert_eq!(split(&[100, 1, 1], 0.2157), Split { train, val, divided: Some(0) });
        // Too little to divide.
        assert_eq!(split(&[1], 0.5).val, []);
    }

    #[test]
    fn shards_by_example() {
        assert!(shard_sizes([], 8).is_empty());
        assert_eq!(shard_sizes([1, 2], 8), [3]);
        assert_eq!(shard_sizes([1, 2, 30], u64::MAX), [33]);
        // Cut within the long document only.
        assert_eq!(shard_sizes([3, 20, 1], 8), [8, 8, 8]);
        // A short rest joins the last shard.
        assert_eq!(shard_sizes([8, 1], 8), [9]);
    }

    proptest! {
        #[test]
        fn validation_gets_its_share(sizes in prop::collection::vec(1u64..1000, 1..40), val_frac in 0.0f64..=0.5) {
            let total: u64 = sizes.iter().sum();
            let split = split(&sizes, val_frac);
            prop_assert_eq!(bytes(&split.train) + bytes(&split.val), total);
            prop_assert!(!split.train.is_empty());
            // Every byte is in one place, in order.
            let mut pieces: Vec<_> = split.train.iter().chain(&split.val).collect();
            pieces.sort_by_key(|piece| (piece.document, piece.start));
            let mut next = (0, 0);
            for piece in pieces {
                prop_assert_eq!((piece.document, piece.start), next);
                prop_assert!(piece.start < piece.end);
                next = if piece.end == sizes[piece.document] { (piece.document + 1, 0) } else { (piece.document, piece.end) };
            }
            prop_assert_eq!(next, (sizes.len(), 0));
            for side in [&split.train, &split.val] {
                prop_assert!(side.is_sorted_by_key(|piece| piece.document));
            }

            let share = (val_frac * total as f64).round() as u64;
            let val = bytes(&split.val);
            if split.divided.is_some() {
                prop_assert_eq!(val, share);
            } else {
                // Of documents of one byte there may be none to divide.
                let least = if sizes.contains(&1) { (share / 2).saturating_sub(1) } else { share / 2 };
                prop_assert!((least..=share).contains(&val), "{} of {}", val, share);
            }
        }

        #[test]
        fn many_documents_fill_the_share(sizes in prop::collection::vec(1u64..1000, 200..400), val_frac in 0.05f64..=0.5) {
            let split = split(&sizes, val_frac);
            let share = val_frac * sizes.iter().sum::<u64>() as f64;
            prop_assert_eq!(split.divided, None);
            prop_assert!((bytes(&split.val) as f64 - share).abs() < 0.01 * share);
        }

        #[test]
        fn shards_are_neither_short_nor_long(sizes in prop::collection::vec(1u64..500, 0..40), shard_size in 4u64..300) {
            let shards = shard_sizes(sizes.iter().copied(), shard_size);
            let total: u64 = sizes.iter().sum();
            prop_assert_eq!(shards.iter().sum::<u64>(), total);
            let half = shard_size / 2;
            if let Some((last, others)) = shards.split_last() {
                prop_assert!(others.iter().all(|shard| (half..=shard_size + half).contains(shard)), "{:?}", shards);
                prop_assert!(*last >= half.min(total) && *last <= 2 * shard_size, "{:?}", shards);
            }
            // No document that fits a shard is cut.
            let mut end = 0;
            let ends: Vec<u64> = shards.iter().map(|shard| { end += shard; end }).collect();
            let mut start = 0;
            for size in sizes {
                let inside = ends.iter().any(|&end| start < end && end < start + size);
                prop_assert!(!inside || size > shard_size);
                start += size;
            }
        }
    }
}

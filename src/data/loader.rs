//! Copies windows into batches ahead of the training loop, on a thread of its own.
//!
//! One micro-step over all ranks takes `world * batch_size` consecutive entries of the order; row b of rank r
//! is entry `r * batch_size + b` of them. So ranks never share a window of a pass, and the windows of a step
//! depend on the number of rows in all, not on how they are dealt out.

use std::panic;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError, sync_channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::{ByteDataset, DataError, Position, Windows};
use crate::config::Order;

/// Batches kept ready.
const DEPTH: usize = 4;

/// What a [`Loader`] loads.
#[derive(Debug, Clone, Copy)]
pub struct LoaderOptions {
    /// The order of the windows.
    pub order: Order,
    /// Its seed.
    pub seed: u64,
    /// Where to begin in it.
    pub start: Position,
    /// Rows of this rank's micro-batch: B.
    pub batch_size: usize,
    /// Micro-batches per optimizer step.
    pub grad_accum: usize,
    /// This process among the `world`.
    pub rank: usize,
    /// Number of processes that train together.
    pub world: usize,
}

impl LoaderOptions {
    fn validate(&self) -> Result<(), DataError> {
        for (option, value) in [("batch_size", self.batch_size), ("grad_accum", self.grad_accum), ("world", self.world)]
        {
            if value == 0 {
                return Err(DataError::invalid(option, "must be at least 1"));
            }
        }
        if self.rank >= self.world {
            let message = format!("{} is not below the number of ranks, {}", self.rank, self.world);
            return Err(DataError::invalid("rank", message));
        }
        Ok(())
    }
}

/// One micro-batch of one rank.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// `[B, T + 1]`, row by row: columns `0 .. T` are the input, `1 .. T + 1` the targets.
    pub bytes: Vec<u8>,
    /// Number of rows: B.
    pub rows: usize,
    /// Number of columns: T + 1.
    pub width: usize,
    /// Where the order stands once all ranks have taken this micro-batch.
    pub position_after: Position,
}

/// An iterator over the micro-batches of one rank. Ends with the plan, or after the first error; dropping it
/// ends its thread.
#[derive(Debug)]
pub struct Loader {
    /// None once the loader is being dropped.
    batches: Option<Receiver<Result<Batch, DataError>>>,
    /// None once it has been joined.
    thread: Option<JoinHandle<()>>,
    waited: Duration,
    waits: u64,
}

impl Loader {
    /// Starts loading. `seq_lens` is the plan: the sequence length of each optimizer step still to run, and
    /// with it how many there are. A sequence length too long for a shard is an error only when its step
    /// comes: ask [`Order::windows`] for the longest of them first.
    ///
    /// # Errors
    /// Options out of their range; a thread that the system refuses.
    pub fn new<I>(dataset: Arc<dyn ByteDataset>, options: LoaderOptions, seq_lens: I) -> Result<Self, DataError>
    where
        I: IntoIterator<Item = usize>,
        I::IntoIter: Send + 'static,
    {
        options.validate()?;
        let (sender, batches) = sync_channel(DEPTH);
        let mut work = Work { dataset, options, position: options.start, windows: None };
        let seq_lens = seq_lens.into_iter();
        let run = move || {
            for seq_len in seq_lens {
                for _ in 0..options.grad_accum {
                    let batch = work.batch(seq_len);
                    let failed = batch.is_err();
                    // Nobody receives any more once the loader is dropped.
                    if sender.send(batch).is_err() || failed {
                        return;
                    }
                }
            }
        };
        let thread = thread::Builder::new().name("loader".into()).spawn(run).map_err(DataError::Thread)?;
        Ok(Self { batches: Some(batches), thread: Some(thread), waited: Duration::ZERO, waits: 0 })
    }

    /// Seconds spent in `next` waiting for batches that were not ready.
    pub fn wait_seconds(&self) -> f64 {
        self.waited.as_secs_f64()
    }

    /// Number of batches that were not ready when they were asked for. The first seldom is.
    pub fn waits(&self) -> u64 {
        self.waits
    }

    /// Waits for the next batch; none once the thread has ended.
    fn receive(&mut self) -> Option<Result<Batch, DataError>> {
        let batches = self.batches.as_ref()?;
        match batches.try_recv() {
            Ok(batch) => Some(batch),
            Err(TryRecvError::Disconnected) => None,
            Err(TryRecvError::Empty) => {
                let start = Instant::now();
                let batch = batches.recv().ok();
                self.waited += start.elapsed();
                self.waits += u64::from(batch.is_some());
                batch
            }
        }
    }
}

impl Iterator for Loader {
    type Item = Result<Batch, DataError>;

    fn next(&mut self) -> Option<Self::Item> {
        let batch = self.receive();
        // A thread that panicked must not look like a plan that ended.
        if batch.is_none()
            && let Some(thread) = self.thread.take()
            && let Err(payload) = thread.join()
        {
            panic::resume_unwind(payload);
        }
        batch
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        // A thread that waits for room in the channel fails to send once the receiver is gone.
        drop(self.batches.take());
        if let Some(thread) = self.thread.take() {
            // Its panic has nobody left to go to.
            let _ = thread.join();
        }
    }
}

/// The thread's side.
struct Work {
    dataset: Arc<dyn ByteDataset>,
    options: LoaderOptions,
    position: Position,
    /// Those of the last batch.
    windows: Option<Windows>,
}

impl Work {
    fn batch(&mut self, seq_len: usize) -> Result<Batch, DataError> {
        let LoaderOptions { order, seed, batch_size, rank, world, .. } = self.options;
        let windows = match self.windows.take().filter(|windows| windows.seq_len() == seq_len) {
            Some(windows) => windows,
            None => order.windows(&*self.dataset, seq_len)?,
        };
        let count = windows.count();
        let start = self.position.on(&windows);
        let rows = batch_size as u64;

        let width = seq_len + 1;
        let mut bytes = Vec::new();
        let size = batch_size.saturating_mul(width);
        bytes.try_reserve_exact(size).map_err(|_| {
            DataError::invalid("batch_size", format!("{batch_size} windows of {width} bytes do not fit in memory"))
        })?;
        let mut position = order.advance(start, rank as u64 * rows, count);
        for _ in 0..batch_size {
            if let Some((shard, range)) = windows.locate(order.window(seed, position, count)) {
                bytes.extend_from_slice(&self.dataset.shards()[shard].bytes()[range]);
            }
            position = order.advance(position, 1, count);
        }
        debug_assert_eq!(bytes.len(), size, "an order gives only numbers of windows");

        self.position = order.advance(start, world as u64 * rows, count);
        self.windows = Some(windows);
        Ok(Batch { bytes, rows: batch_size, width, position_after: self.position })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::time::Duration;

    use proptest::prelude::*;
    use tempfile::TempDir;

    use super::*;
    use crate::data::{Shard, open};

    const ORDERS: [Order; 3] = [Order::Shuffled, Order::Random, Order::Sequential];

    /// Shards whose windows at any sequence length of at least 4 all differ: numbers counted up.
    fn dataset(sizes: &[usize]) -> (TempDir, Arc<dyn ByteDataset>) {
        let dir = tempfile::tempdir().unwrap();
        let mut counter = 0u32;
        for (index, &size) in sizes.iter().enumerate() {
            let mut bytes = Vec::new();
            while bytes.len() < size {
                bytes.extend(counter.to_be_bytes());
                counter += 1;
            }
            bytes.truncate(size);
            std::fs::write(dir.path().join(format!("shard_{index:05}.bin")), bytes).unwrap();
        }
        let dataset = open(dir.path().to_str().unwrap()).unwrap();
        (dir, dataset)
    }

    fn options(order: Order) -> LoaderOptions {
        LoaderOptions { order, seed: 3, start: Position::default(), batch_size: 2, grad_accum: 1, rank: 0, world: 1 }
    }

    fn load(dataset: &Arc<dyn ByteDataset>, options: LoaderOptions, plan: &[usize]) -> Vec<Batch> {
        Loader::new(dataset.clone(), options, plan.to_vec()).unwrap().collect::<Result<_, _>>().unwrap()
    }

    fn rows(batches: &[Batch]) -> Vec<Vec<u8>> {
        batches.iter().flat_map(|batch| batch.bytes.chunks(batch.width).map(<[u8]>::to_vec)).collect()
    }

    #[test]
    fn every_window_comes_once_per_epoch() {
        let (_dir, dataset) = dataset(&[100, 61, 200]);
        let windows = dataset.windows(8).unwrap();
        let count = windows.count() as usize;
        assert_eq!(count, 99 / 8 + 60 / 8 + 199 / 8);
        let all: HashSet<_> = (0..windows.count())
            .map(|index| windows.locate(index).unwrap())
            .map(|(shard, range)| dataset.shards()[shard].bytes()[range].to_vec())
            .collect();
        assert_eq!(all.len(), count);
        for order in [Order::Shuffled, Order::Sequential] {
            // Two rows a batch, an odd number of windows: an epoch ends within a batch.
            assert_eq!(count % 2, 1);
            let rows = rows(&load(&dataset, options(order), &vec![8; count]));
            let (first, second) = rows.split_at(count);
            for epoch in [first, second] {
                assert_eq!(epoch.iter().cloned().collect::<HashSet<_>>(), all);
            }
            assert_eq!(first == second, order == Order::Sequential);
        }
    }

    #[test]
    fn random_windows_start_anywhere() {
        let (_dir, dataset) = dataset(&[20, 12]);
        let offsets: HashSet<_> = rows(&load(&dataset, options(Order::Random), &[8; 200])).into_iter().collect();
        assert_eq!(offsets.len(), 20 - 8 + 12 - 8);
        for row in offsets {
            assert!(dataset.shards().iter().any(|shard| shard.bytes().windows(9).any(|window| window == row)));
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn resuming_goes_on_as_if_never_stopped(
            order in prop::sample::select(&ORDERS[..]),
            plan in prop::collection::vec(prop::sample::select(&[4usize, 4, 4, 9][..]), 1..12),
            (batch_size, grad_accum, world, rank) in (1usize..4, 1usize..4, 1usize..4, 0usize..4),
            stop: prop::sample::Index,
        ) {
            let (_dir, dataset) = dataset(&[50, 33]);
            let options = LoaderOptions { batch_size, grad_accum, world, rank: rank % world, ..options(order) };
            let whole = load(&dataset, options, &plan);
            prop_assert_eq!(whole.len(), plan.len() * grad_accum);
            let stop = stop.index(plan.len() + 1);
            let saved = match stop {
                0 => Position::default(),
                _ => whole[stop * grad_accum - 1].position_after,
            };
            let text = serde_json::to_string(&saved).unwrap();
            let start = serde_json::from_str(&text).unwrap();
            let rest = load(&dataset, LoaderOptions { start, ..options }, &plan[stop..]);
            prop_assert_eq!(&rest[..], &whole[stop * grad_accum..]);
        }

        #[test]
        fn ranks_share_out_what_one_would_take(
            order in prop::sample::select(&ORDERS[..]),
            (world, batch_size, steps) in (1usize..5, 1usize..4, 1usize..10),
        ) {
            let (_dir, dataset) = dataset(&[90, 41]);
            let plan = vec![5; steps];
            let alone = load(&dataset, LoaderOptions { batch_size: world * batch_size, ..options(order) }, &plan);
            let ranks: Vec<_> = (0..world)
                .map(|rank| load(&dataset, LoaderOptions { world, rank, batch_size, ..options(order) }, &plan))
                .collect();
            for (step, batch) in alone.iter().enumerate() {
                let dealt: Vec<u8> = ranks.iter().flat_map(|batches| batches[step].bytes.clone()).collect();
                prop_assert_eq!(&dealt, &batch.bytes);
                for batches in &ranks {
                    prop_assert_eq!(batches[step].position_after, batch.position_after);
                }
            }
        }
    }

    #[test]
    fn ranks_are_disjoint_within_an_epoch() {
        let (_dir, dataset) = dataset(&[401]);
        // 100 windows of 4, 25 micro-steps of 2 ranks and 2 rows.
        let ranks: Vec<_> = (0..2)
            .map(|rank| load(&dataset, LoaderOptions { world: 2, rank, ..options(Order::Shuffled) }, &[4; 25]))
            .map(|batches| rows(&batches).into_iter().collect::<HashSet<_>>())
            .collect();
        assert_eq!((ranks[0].len(), ranks[1].len()), (50, 50));
        assert!(ranks[0].is_disjoint(&ranks[1]));
    }

    #[test]
    fn a_new_sequence_length_begins_a_new_pass() {
        let (_dir, dataset) = dataset(&[41]);
        let batches = load(&dataset, options(Order::Sequential), &[4, 4, 8, 8, 8]);
        let places: Vec<_> = batches.iter().map(|b| (b.position_after.epoch, b.position_after.next)).collect();
        // 10 windows of 4; then 5 of 8.
        assert_eq!(places, [(0, 2), (0, 4), (1, 2), (1, 4), (2, 1)]);
        assert_eq!(batches[2].bytes[..9], dataset.shards()[0].bytes()[..9]);
        assert_eq!(batches[2].width, 9);
    }

    #[test]
    fn errors_come_out_and_end_it() {
        let (_dir, dataset) = dataset(&[20]);
        let mut loader = Loader::new(dataset.clone(), options(Order::Shuffled), [8, 20, 8]).unwrap();
        assert!(loader.next().unwrap().is_ok());
        assert!(loader.next().unwrap().unwrap_err().to_string().contains("20 bytes"));
        assert!(loader.next().is_none());
        assert!(loader.next().is_none());

        let refused = |options| Loader::new(dataset.clone(), options, [8]).unwrap_err().to_string();
        assert!(refused(LoaderOptions { batch_size: 0, ..options(Order::Shuffled) }).starts_with("batch_size"));
        let mut huge =
            Loader::new(dataset.clone(), LoaderOptions { batch_size: usize::MAX, ..options(Order::Random) }, [8]);
        assert!(huge.as_mut().unwrap().next().unwrap().unwrap_err().to_string().contains("do not fit in memory"));
        assert!(refused(LoaderOptions { rank: 1, ..options(Order::Shuffled) }).starts_with("rank"));
    }

    #[test]
    fn dropping_it_ends_the_thread() {
        let (_dir, dataset) = dataset(&[100]);
        for taken in 0..8 {
            let mut loader = Loader::new(dataset.clone(), options(Order::Random), std::iter::repeat(8)).unwrap();
            assert_eq!(loader.by_ref().take(taken).count(), taken);
            drop(loader);
            // The thread held the other reference.
            assert_eq!(Arc::strong_count(&dataset), 1);
        }
    }

    #[test]
    #[should_panic(expected = "told to")]
    fn a_panic_of_the_thread_is_not_an_end() {
        struct Broken;
        impl ByteDataset for Broken {
            fn shards(&self) -> &[Shard] {
                panic!("told to")
            }
        }
        let mut loader = Loader::new(Arc::new(Broken), options(Order::Shuffled), [8]).unwrap();
        loader.next();
    }

    #[test]
    fn batches_are_made_while_nobody_asks_for_them() {
        let (_dir, dataset) = dataset(&[1 << 16]);
        // The thread reads the plan as it goes: that it begins a step says that the batch before is ready.
        let (begins, begun) = std::sync::mpsc::channel();
        let plan = (0..400).map(move |step| {
            begins.send(step).unwrap();
            64
        });
        let mut loader = Loader::new(dataset, options(Order::Shuffled), plan).unwrap();
        let mut ahead = 0;
        for taken in 0..399 {
            while ahead <= taken {
                ahead = begun.recv_timeout(Duration::from_secs(120)).expect("it goes on without being asked");
            }
            loader.next().unwrap().unwrap();
        }
        assert_eq!(loader.waits(), 0);
        assert!(loader.next().unwrap().is_ok() && loader.next().is_none());
    }
}

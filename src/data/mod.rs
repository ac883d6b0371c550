//! Bytes on disk and the order they are trained in.
//!
//! A dataset ([`open`]) is memory-mapped bytes in one or more shards; [`Windows`] cuts them into training
//! windows; [`Order`](crate::config::Order) and [`Position`] say which window comes when; [`Loader`] copies them into batches on
//! a thread of its own; [`pack`](fn@pack) makes shards from text files. Knows no tensor: a batch is bytes.

mod byte_shard_dataset;
mod byte_stream_dataset;
mod dataset;
mod error;
mod loader;
mod order;
mod pack;
mod pack_plan;
pub mod stream;
mod windows;

pub use byte_shard_dataset::ByteShardDataset;
pub use byte_stream_dataset::ByteStreamDataset;
pub use dataset::{ByteDataset, Shard, open};
pub use error::DataError;
pub use loader::{Batch, Loader, LoaderOptions};
pub use order::Position;
pub use pack::{MANIFEST, PackOptions, PackReport, PackWarning, SplitReport, pack};
pub use windows::Windows;

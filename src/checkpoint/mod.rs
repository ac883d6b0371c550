//! Checkpoints: PyTorch's zip and pickle, safetensors, and what a training checkpoint holds.

mod convert;
mod error;
pub mod pickle;
pub mod safetensors_file;
pub mod torch_file;
mod training_checkpoint;
mod value;

pub use convert::{WeightDtype, convert};
pub use error::CheckpointError;
pub(crate) use training_checkpoint::parameter_names;
pub use training_checkpoint::{Contents, Progress, TrainingCheckpoint, load_for_inference, load_model};
pub use value::{Dtype, Storage, TensorData, Value};

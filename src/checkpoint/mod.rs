//! Checkpoints: PyTorch's zip and pickle, safetensors, and what a training checkpoint holds.

mod convert;
mod error;
mod optimizer_state;
mod original_args;
pub mod pickle;
pub mod safetensors_file;
mod state_dict;
pub mod torch_file;
mod training_checkpoint;
mod value;

pub use convert::{WeightDtype, convert};
pub use error::CheckpointError;
pub use original_args::{Rule, rule_of};
pub use state_dict::WeightsShape;
pub(crate) use state_dict::parameter_names;
pub use torch_file::Format;
pub use training_checkpoint::{
    Contents, Given, Progress, TrainingCheckpoint, build_for_inference, build_model, load_for_inference, load_model,
};
use training_checkpoint::{tensor_data, to_tensor};
pub use value::{Dtype, Storage, TensorData, Value};

//! BitByteLM, layer by layer, over tch's `Tensor` and `nn::VarStore`.

mod attention;
mod bitbytelm;
mod block;
mod mlp;
mod rmsnorm;
mod rope;

pub use attention::{Attention, LayerCache};
pub use bitbytelm::{BitByteLM, KvCache};
pub use block::Block;
pub use mlp::Mlp;
pub use rmsnorm::RmsNorm;
pub use rope::Rope;

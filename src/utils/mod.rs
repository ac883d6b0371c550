//! What training uses and a model does not know: optimizers and the gradient scaler,
//! devices, files that are whole or not at all, files as memory.

pub mod atomic;
pub mod decay;
pub mod device;
pub mod mapped;
pub mod optim;

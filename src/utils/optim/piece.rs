//! Parts of parameters, which an optimizer can step as it does whole ones.

use tch::Tensor;

/// Neighbouring elements of one parameter, taken flat. It begins on a block boundary of the parameter, and ends on one
/// or with it, so that no block of 8-bit moments ([`crate::kernels::BLOCK`]) is divided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Which parameter, in PyTorch's order.
    pub param: usize,
    /// Its first element.
    pub start: i64,
    /// Number of elements.
    pub len: i64,
}

impl Piece {
    /// Its part of `whole`, contiguous, one value an element of the parameter: a view `[len]`.
    pub fn of(&self, whole: &Tensor) -> Tensor {
        whole.view([-1]).narrow(0, self.start, self.len)
    }
}

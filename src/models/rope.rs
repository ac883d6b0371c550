//! Rotary position embedding (Su et al. 2021, arXiv 2104.09864), in the half-split layout of
//! GPT-NeoX and LLaMA: dimension i turns together with dimension i + D/2.

use std::sync::{Mutex, PoisonError};

use tch::{Device, Kind, Tensor};

use crate::kernels;
use crate::libtorch::or_panic;

/// The angles' cosines and sines for a run of positions.
#[derive(Debug)]
pub struct Rope {
    /// `[T, D/2]` fp32
    cos: Tensor,
    /// `[T, D/2]` fp32
    sin: Tensor,
    /// Whether kernels of our own turn.
    fused: bool,
}

impl Rope {
    /// Tables for positions `start .. start + len` and heads of width `head_dim` (even):
    /// angle(t, i) = t · base^(-2i / head_dim).
    pub fn new(head_dim: i64, base: f64, start: i64, len: i64, device: Device, fused: bool) -> Self {
        let options = (Kind::Float, device);
        let exponents = Tensor::arange_start_step(0, head_dim, 2, options) / head_dim as f64;
        let inverse_frequency = Tensor::full([1], base, options).pow(&exponents).reciprocal();
        let positions = Tensor::arange_start(start, start + len, options);
        let angles = positions.outer(&inverse_frequency);
        Self { cos: angles.cos(), sin: angles.sin(), fused }
    }

    /// Turns each head's vector by its position's angles.
    ///
    /// # Shapes
    /// `x`: `[B, T, H, D]` → the same, computed in fp32 and returned in `x`'s dtype.
    pub fn apply(&self, x: &Tensor) -> Tensor {
        if self.fused {
            return or_panic(kernels::rope(x, &self.cos, &self.sin));
        }
        let (cos, sin) = (self.cos.unsqueeze(1), self.sin.unsqueeze(1)); // [T, 1, D/2]
        let halves = x.chunk(2, -1);
        let (a, b) = (&halves[0], &halves[1]);
        Tensor::cat(&[a * &cos - b * &sin, a * &sin + b * &cos], -1).to_kind(x.kind())
    }

    /// Another handle to the same tensors.
    pub fn shallow_clone(&self) -> Self {
        Self { cos: self.cos.shallow_clone(), sin: self.sin.shallow_clone(), fused: self.fused }
    }
}

/// Positions whose angles are computed together.
const BLOCK: i64 = 128;

/// The tables of a model, computed once and kept with it.
///
/// A position's angles are always computed with the same neighbours, whatever the length of the table: so they have the
/// same bits after a longer sequence came, or in a resumed run.
#[derive(Debug)]
pub(super) struct RopeTables {
    head_dim: i64,
    base: f64,
    fused: bool,
    /// By device, each from position 0. A longer one is made beside the shorter, since a recorded CUDA graph may go on
    /// reading that; lengths double, so that all of them are less than twice the longest.
    tables: Mutex<Vec<(Device, Rope)>>,
}

impl RopeTables {
    /// For heads of width `head_dim`, as [`Rope::new`]; none is made yet.
    pub(super) fn new(head_dim: i64, base: f64, fused: bool) -> Self {
        Self { head_dim, base, fused, tables: Mutex::default() }
    }

    /// For positions `start .. start + len`, on `device`.
    pub(super) fn get(&self, start: i64, len: i64, device: Device) -> Rope {
        let end = start + len;
        let mut tables = self.tables.lock().unwrap_or_else(PoisonError::into_inner);
        let long_enough = |(on, table): &(Device, Rope)| *on == device && table.cos.size()[0] >= end;
        let at = tables.iter().position(long_enough).unwrap_or_else(|| {
            tables.push((device, self.table(end, device)));
            tables.len() - 1
        });
        let narrow = |tensor: &Tensor| tensor.narrow(0, start, len);
        let Rope { cos, sin, fused } = &tables[at].1;
        Rope { cos: narrow(cos), sin: narrow(sin), fused: *fused }
    }

    /// For the positions from 0 to `end` at least.
    fn table(&self, end: i64, device: Device) -> Rope {
        let blocks = ((end + BLOCK - 1) / BLOCK).max(1) as u64;
        let blocks: Vec<Rope> = (0..blocks.next_power_of_two() as i64)
            .map(|block| Rope::new(self.head_dim, self.base, block * BLOCK, BLOCK, device, self.fused))
            .collect();
        let joined = |tensor: fn(&Rope) -> &Tensor| Tensor::cat(&blocks.iter().map(tensor).collect::<Vec<_>>(), 0);
        Rope { cos: joined(|rope| &rope.cos), sin: joined(|rope| &rope.sin), fused: self.fused }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_the_formula_and_the_same_bits_whatever_came_before() {
        let tables = || RopeTables::new(64, 10_000.0, true);
        let (grown, at_once) = (tables(), tables());
        let whole = at_once.get(0, 1000, Device::Cpu);
        for (start, len) in [(0, 1), (0, 100), (100, 1), (127, 2), (300, 200), (0, 700), (999, 1), (0, 1000)] {
            let part = grown.get(start, len, Device::Cpu);
            for (part, whole) in [(&part.cos, &whole.cos), (&part.sin, &whole.sin)] {
                assert!(part.equal(&whole.narrow(0, start, len)), "{start} {len}");
            }
        }
        let lengths: Vec<i64> = grown.tables.lock().unwrap().iter().map(|(_, table)| table.cos.size()[0]).collect();
        assert_eq!(lengths, [128, 256, 512, 1024], "each made once");
        for (position, i) in [(1i64, 0i64), (77, 3), (500, 31), (999, 0)] {
            let angle = position as f64 * 10_000f64.powf(-2.0 * i as f64 / 64.0);
            // fp32 has an angle of 999 to 6e-5.
            assert!((whole.cos.double_value(&[position, i]) - angle.cos()).abs() < 2e-4, "{position} {i}");
            assert!((whole.sin.double_value(&[position, i]) - angle.sin()).abs() < 2e-4, "{position} {i}");
        }
    }
}

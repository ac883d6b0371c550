//! Where parameters lie in one flat tensor of which each rank has an equal part.

use tch::Tensor;

use crate::kernels::{BLOCK, blocks};
use crate::utils::optim::Piece;

/// Parameters lie one behind the other, each from the beginning of a block of 8-bit moments on, and ranks have the same
/// number of blocks: so a rank's part is made of pieces of parameters that divide no block, at most one of each. What
/// is left, behind a parameter and at the end, belongs to none.
#[derive(Debug)]
pub struct Layout {
    sizes: Vec<Vec<i64>>,
    /// Where each begins.
    starts: Vec<i64>,
    /// Elements of a rank's part.
    part: i64,
}

impl Layout {
    /// That of parameters of these shapes among so many ranks.
    pub fn new(sizes: Vec<Vec<i64>>, ranks: usize) -> Self {
        let mut end = 0;
        let place = |size: &Vec<i64>| {
            let start = end;
            end += blocks(size.iter().product());
            start * BLOCK
        };
        let starts = sizes.iter().map(place).collect();
        Self { sizes, starts, part: (end as u64).div_ceil(ranks as u64) as i64 * BLOCK }
    }

    /// The parameters' shapes.
    pub fn sizes(&self) -> &[Vec<i64>] {
        &self.sizes
    }

    /// Elements of a rank's part.
    pub fn part(&self) -> i64 {
        self.part
    }

    /// Each parameter's place in `flat`, of all ranks, in its shape.
    pub fn params(&self, flat: &Tensor) -> Vec<Tensor> {
        let place = |(size, start): (&Vec<i64>, &i64)| flat.narrow(0, *start, size.iter().product()).view(&size[..]);
        self.sizes.iter().zip(&self.starts).map(place).collect()
    }

    /// What `rank` has of the parameters, in their order.
    pub fn pieces(&self, rank: usize) -> Vec<Piece> {
        let (begin, end) = (rank as i64 * self.part, (rank as i64 + 1) * self.part);
        let piece = |(param, (size, start)): (usize, (&Vec<i64>, &i64))| {
            let numel: i64 = size.iter().product();
            let (from, to) = ((begin - start).max(0), (end - start).min(numel));
            (from < to).then_some(Piece { param, start: from, len: to - from })
        };
        self.sizes.iter().zip(&self.starts).enumerate().filter_map(piece).collect()
    }

    /// The places of `rank`'s `pieces` in its part.
    pub fn places(&self, part: &Tensor, rank: usize, pieces: &[Piece]) -> Vec<Tensor> {
        let place = |piece: &Piece| self.starts[piece.param] + piece.start - rank as i64 * self.part;
        pieces.iter().map(|piece| part.narrow(0, place(piece), piece.len)).collect()
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;
    use crate::config::OptimizerName;
    use crate::kernels::Moment8bit;
    use crate::utils::optim::{Moments, OptimizerState};

    /// Shapes and numbers of ranks, drawn: parameters around the sizes that matter, more ranks than blocks among them.
    fn draw() -> impl Iterator<Item = (Vec<Vec<i64>>, usize)> {
        let below = |n: i64| Tensor::randint(n, [1], (Kind::Int64, Device::Cpu)).int64_value(&[0]);
        let size = move || match below(6) {
            0 => vec![],
            1 => vec![1 + below(3), 1 + below(9)],
            2 => vec![254 + below(4)],
            3 => vec![4095 + below(2)],
            4 => vec![2, 64, 1 + below(60)],
            _ => vec![1 + below(3000)],
        };
        (0..40).map(move |_| {
            let sizes: Vec<Vec<i64>> = (0..1 + below(7)).map(|_| size()).collect();
            (sizes, if below(5) == 0 { 200 } else { 1 + below(12) as usize })
        })
    }

    #[test]
    fn pieces_are_the_parameters_each_block_once_where_they_lie() {
        for (sizes, ranks) in draw() {
            let layout = Layout::new(sizes.clone(), ranks);
            let flat = Tensor::arange(layout.part() * ranks as i64, (Kind::Int64, Device::Cpu));
            let params = layout.params(&flat);
            let mut covered = vec![0; sizes.len()];
            for rank in 0..ranks {
                let pieces = layout.pieces(rank);
                assert!(pieces.windows(2).all(|pair| pair[0].param + 1 == pair[1].param), "one behind the other");
                let part = flat.narrow(0, rank as i64 * layout.part(), layout.part());
                for (piece, place) in pieces.iter().zip(layout.places(&part, rank, &pieces)) {
                    let (end, numel) = (piece.start + piece.len, params[piece.param].numel() as i64);
                    assert!(piece.len > 0 && piece.start % BLOCK == 0 && (end % BLOCK == 0 || end == numel));
                    assert_eq!(covered[piece.param], piece.start, "{sizes:?} {ranks} {piece:?}");
                    covered[piece.param] = end;
                    assert!(place.equal(&piece.of(&params[piece.param])), "{sizes:?} {ranks} {piece:?}");
                    assert!(place.int64_value(&[0]) % BLOCK == 0, "as well aligned as a whole one");
                }
            }
            let whole: Vec<i64> = sizes.iter().map(|size| size.iter().product()).collect();
            assert_eq!(covered, whole, "{ranks} ranks");
            assert!(params.iter().zip(&sizes).all(|(param, size)| param.size() == *size));
            // No more than it takes for equal parts of whole blocks.
            let blocks: i64 = whole.iter().map(|n| blocks(*n)).sum();
            assert!(layout.part() * (ranks as i64) < (blocks + ranks as i64) * BLOCK);
        }
    }

    /// Any numbers of the kind that `tensors` have.
    fn fill(tensors: Vec<Tensor>) {
        for mut tensor in tensors {
            let _ = match tensor.kind() {
                Kind::Uint8 => tensor.random_to_(256),
                _ => tensor.uniform_(-1.0, 1.0),
            };
        }
    }

    #[test]
    fn a_state_dealt_out_and_put_together_is_the_same() {
        for (sizes, ranks) in draw().take(20) {
            let layout = Layout::new(sizes.clone(), ranks);
            for name in [OptimizerName::AdamW, OptimizerName::AdamW8bit] {
                let [whole, again] = [(); 2].map(|()| OptimizerState::zeros(name, &sizes, Device::Cpu));
                fill(whole.tensors());
                for rank in 0..ranks {
                    let pieces = layout.pieces(rank);
                    let mut own = OptimizerState::zeros_of_pieces(name, &sizes, &pieces, Device::Cpu);
                    let views = whole.pieces(&pieces);
                    let shapes = |state: &OptimizerState| {
                        state.tensors().iter().map(|t| (t.kind(), t.size())).collect::<Vec<_>>()
                    };
                    assert_eq!(shapes(&own), shapes(&views), "{name:?} {sizes:?} {ranks}");
                    own.copy_from(&views);
                    again.pieces(&pieces).copy_from(&own);
                }
                let pairs = whole.tensors().into_iter().zip(again.tensors());
                assert!(pairs.into_iter().all(|(a, b)| a.equal(&b)), "{name:?} {sizes:?} {ranks}");
            }
        }
    }

    #[test]
    fn a_piece_keeps_its_moments_as_the_whole_parameter_does() {
        let sizes = [vec![4095], vec![2, 2048]];
        let layout = Layout::new(sizes.to_vec(), 7);
        for rank in 0..7 {
            let pieces = layout.pieces(rank);
            let state = OptimizerState::zeros_of_pieces(OptimizerName::AdamW8bit, &sizes, &pieces, Device::Cpu);
            let OptimizerState::AdamW8bit(state) = state else { panic!("8 bits") };
            for (piece, state) in pieces.iter().zip(&state.params) {
                match &state.moments {
                    Moments::Full([moment, _]) => assert_eq!((piece.param, moment.size()), (0, vec![piece.len])),
                    Moments::Quantized([Moment8bit { codes, absmax }, _]) => {
                        let sizes = (codes.size(), absmax.size());
                        assert_eq!((piece.param, sizes), (1, (vec![piece.len], vec![blocks(piece.len)])));
                    }
                }
            }
        }
    }
}

//! The optimizer's state sharded over ranks: ZeRO stage 1 (Rajbhandari et al. 2020, arXiv 1910.02054).
//!
//! All parameters lie in one flat tensor, and so do their gradients, each rank having an equal part ([`Layout`]). A
//! step is: reduce-scatter (each rank gets the mean gradient of its part), the optimizer on what pieces of parameters
//! that part is made of, all-gather of the parameters. So a rank keeps 1/N of the moments, of AdamW's 8 bytes a
//! parameter or AdamW8bit's 2, and sends as much as an all-reduce would.

use tch::{Device, Kind, Tensor};

use super::layout::Layout;
use crate::config::OptimConfig;
use crate::libtorch::{Error, ProcessGroup, mark_written, set_grad};
use crate::utils::optim::{Optimizer, OptimizerState, Piece};

/// Parameters and gradients laid out flat, and this rank's part of them.
#[derive(Debug)]
pub struct Shards {
    layout: Layout,
    rank: usize,
    ranks: usize,
    /// What this rank's part is made of.
    pieces: Vec<Piece>,
    /// All parameters, `[N · part]`; the model's are views of it.
    params: Tensor,
    /// Handles to the model's.
    model: Vec<Tensor>,
    /// Their gradients, likewise.
    grads: Tensor,
    /// This rank's mean gradient, `[part]`.
    grad: Tensor,
}

impl Shards {
    /// Moves `params` (fp32, on one device) into one flat tensor, of which they become views.
    ///
    /// # Errors
    /// libtorch's own.
    pub fn new(params: Vec<Tensor>, rank: usize, ranks: usize) -> Result<Self, Error> {
        let _no_grad = tch::no_grad_guard();
        let device = params.first().map_or(Device::Cpu, Tensor::device);
        let layout = Layout::new(params.iter().map(Tensor::size).collect(), ranks);
        let zeros = |parts: i64| Tensor::zeros([parts * layout.part()], (Kind::Float, device));
        let (flat, grads, grad) = (zeros(ranks as i64), zeros(ranks as i64), zeros(1));
        let mut model = params;
        for ((param, mut value), grad) in model.iter_mut().zip(layout.params(&flat)).zip(layout.params(&grads)) {
            value.copy_(param);
            param.set_data(&value);
            set_grad(param, &grad)?;
        }
        Ok(Self { pieces: layout.pieces(rank), layout, rank, ranks, params: flat, model, grads, grad })
    }

    /// This rank's part of the parameters.
    fn param(&self) -> Tensor {
        self.params.narrow(0, self.rank as i64 * self.layout.part(), self.layout.part())
    }

    /// The pieces of parameters that this rank steps, as views `[len]`. None, where there are more ranks than blocks.
    fn pieces(&self) -> Vec<Tensor> {
        self.layout.places(&self.param(), self.rank, &self.pieces)
    }

    /// A fresh optimizer of this rank's pieces.
    pub fn optimizer(&self, config: &OptimConfig) -> Optimizer {
        Optimizer::of_pieces(self.pieces(), self.layout.sizes(), &self.pieces, config)
    }

    /// Those of this rank's pieces that belong to parameters of two or more dimensions.
    pub fn matrices(&self) -> Vec<Tensor> {
        let matrix = |piece: &Piece| self.layout.sizes()[piece.param].len() >= 2;
        self.pieces().into_iter().zip(&self.pieces).filter(|(_, piece)| matrix(piece)).map(|(view, _)| view).collect()
    }

    /// Sets all gradients to zero.
    pub fn zero_grad(&mut self) {
        let _ = self.grads.zero_();
    }

    /// The mean over ranks of this rank's pieces' gradients.
    ///
    /// # Errors
    /// A rank is lost.
    pub fn reduce_gradients(&mut self, group: &ProcessGroup) -> Result<Vec<Tensor>, Error> {
        group.reduce_scatter(&self.grad, &self.grads)?;
        let _ = self.grad.g_div_scalar_(self.ranks as f64);
        Ok(self.layout.places(&self.grad, self.rank, &self.pieces))
    }

    /// This rank's share of each parameter's squared gradient norm, out of the `norms` of its pieces' gradients: fp64
    /// `[P]` for P parameters. The sum over ranks is the whole.
    pub fn squared_norms(&self, norms: &Tensor) -> Tensor {
        let squares = Tensor::zeros([self.layout.sizes().len() as i64], (Kind::Double, self.grad.device()));
        // Pieces are of parameters one behind the other.
        if let Some(first) = self.pieces.first() {
            let own = squares.narrow(0, first.param as i64, self.pieces.len() as i64);
            own.shallow_clone().copy_(&norms.to_kind(Kind::Double).square());
        }
        squares
    }

    /// After each rank has stepped its pieces: gives every rank all of them.
    ///
    /// # Errors
    /// A rank is lost.
    pub fn gather_parameters(&self, group: &ProcessGroup) -> Result<(), Error> {
        let _no_grad = tch::no_grad_guard();
        // Not in place: Gloo's all-gather must not read what it writes.
        group.all_gather(&self.params, &self.param().copy())?;
        // They share the flat tensor's memory, but not its count of writes, which what is cached of a weight goes by.
        mark_written(&self.model)
    }

    /// The whole optimizer state on the CPU, parameter by parameter, on rank 0; nothing on the others, which
    /// take part. On the device it takes one further part.
    ///
    /// # Errors
    /// A rank is lost.
    pub fn gather_state(&self, group: &ProcessGroup, own: &OptimizerState) -> Result<Option<OptimizerState>, Error> {
        let sizes = self.layout.sizes();
        let whole = (self.rank == 0).then(|| OptimizerState::zeros(own.name(), sizes, Device::Cpu));
        for rank in 0..self.ranks {
            let pieces = self.layout.pieces(rank);
            let theirs = (rank != self.rank).then(|| self.buffer(own, &pieces));
            let state = theirs.as_ref().unwrap_or(own);
            group.broadcast(&state.tensors(), rank)?;
            if let Some(whole) = &whole {
                whole.pieces(&pieces).copy_from(state);
            }
        }
        Ok(whole)
    }

    /// Gives each rank its part of rank 0's whole state.
    ///
    /// # Errors
    /// A rank is lost.
    pub fn scatter_state(
        &self,
        group: &ProcessGroup,
        whole: Option<&OptimizerState>,
        own: &mut OptimizerState,
    ) -> Result<(), Error> {
        for rank in 0..self.ranks {
            let pieces = self.layout.pieces(rank);
            let mut state = self.buffer(own, &pieces);
            if let Some(whole) = whole {
                state.copy_from(&whole.pieces(&pieces));
            }
            group.broadcast(&state.tensors(), 0)?;
            if rank == self.rank {
                own.copy_from(&state);
            }
        }
        Ok(())
    }

    /// Room for the state of a rank's `pieces`.
    fn buffer(&self, own: &OptimizerState, pieces: &[Piece]) -> OptimizerState {
        OptimizerState::zeros_of_pieces(own.name(), self.layout.sizes(), pieces, self.params.device())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::config::OptimizerName;
    use crate::libtorch::{Backend, Store, foreach_norms};

    const CPU: (Kind, Device) = (Kind::Float, Device::Cpu);

    /// Runs as each of `ranks` ranks, in threads, with a Gloo group of them; what they found, in their order.
    fn together<T: Send>(ranks: usize, run: impl Fn(usize, ProcessGroup) -> T + Sync) -> Vec<T> {
        let wait = Duration::from_secs(60);
        let store = Store::serve("127.0.0.1", 0, wait).unwrap();
        let port = store.port();
        let rank = |rank| {
            let store = Store::connect("127.0.0.1", port, wait, "").unwrap();
            run(rank, ProcessGroup::new(&store, rank, ranks, Backend::Gloo, Device::Cpu, wait).unwrap())
        };
        std::thread::scope(|scope| {
            let rank = &rank;
            let threads: Vec<_> = (0..ranks).map(|r| scope.spawn(move || rank(r))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }

    /// What training leaves: parameters, and the whole state.
    fn found(params: &[Tensor], state: &OptimizerState) -> Vec<Tensor> {
        params.iter().map(Tensor::detach).chain(state.tensors()).map(|t| t.copy()).collect()
    }

    #[test]
    fn ranks_step_and_keep_to_the_last_bit_what_one_optimizer_would() {
        let many: &[&[i64]] = &[&[4, 3], &[3], &[40, 130], &[4095], &[], &[2, 2048], &[257]];
        // The last two have four blocks and one: more ranks than that.
        for (sizes, ranks) in [(many, 1), (many, 2), (many, 3), (&[&[16, 16][..], &[300], &[]], 6), (&[&[5, 5][..]], 2)]
        {
            for name in [OptimizerName::AdamW, OptimizerName::AdamW8bit] {
                let config = OptimConfig { name, ..OptimConfig::default() };
                let initial: Vec<Tensor> = sizes.iter().map(|size| Tensor::randn(*size, CPU)).collect();
                // Of so few bits that their sums and means are exact.
                let grads: Vec<Vec<Tensor>> = (0..6)
                    .map(|_| sizes.iter().map(|s| Tensor::randn(*s, CPU).to_kind(Kind::BFloat16).to_kind(Kind::Float)))
                    .map(Iterator::collect)
                    .collect();
                let go = || Tensor::zeros([], CPU);
                let leaves =
                    |from: &[Tensor]| -> Vec<_> { from.iter().map(|p| p.copy().set_requires_grad(true)).collect() };

                let params = leaves(&initial);
                let mut optimizer = Optimizer::new(params.iter().map(Tensor::shallow_clone).collect(), &config);
                for grads in &grads[..3] {
                    optimizer.step(grads, 1e-2, 0.1, &go()).unwrap();
                }
                let half = found(&params, &optimizer.state);
                for grads in &grads[3..] {
                    optimizer.step(grads, 1e-2, 0.1, &go()).unwrap();
                }
                let whole = found(&params, &optimizer.state);

                // Tensors go to a thread, but are not shared by threads.
                let given = std::sync::Mutex::new((half, grads));
                let of_ranks = together(ranks, |rank, group| {
                    let (half, grads) = {
                        let given = given.lock().unwrap();
                        let copy = |all: &[Tensor]| all.iter().map(Tensor::copy).collect::<Vec<_>>();
                        (copy(&given.0), given.1[3..].iter().map(|grads| copy(grads)).collect::<Vec<_>>())
                    };
                    let params = leaves(&half[..sizes.len()]);
                    let model: Vec<_> = params.iter().map(Tensor::shallow_clone).collect();
                    let mut shards = Shards::new(params, rank, ranks).unwrap();
                    let mut optimizer = shards.optimizer(&config);
                    let restored = (rank == 0).then(|| {
                        let state = OptimizerState::zeros(name, sizes, Device::Cpu);
                        let numbers = half[sizes.len()..].iter();
                        state.tensors().iter_mut().zip(numbers).for_each(|(to, from)| to.copy_(from));
                        state
                    });
                    shards.scatter_state(&group, restored.as_ref(), &mut optimizer.state).unwrap();
                    for grads in &grads {
                        shards.zero_grad();
                        // All of it comes from one rank.
                        for (param, grad) in model.iter().zip(grads).filter(|_| rank + 1 == ranks) {
                            param.grad().copy_(&(grad * ranks as f64));
                        }
                        let own = shards.reduce_gradients(&group).unwrap();
                        let squares = shards.squared_norms(&foreach_norms(&own).unwrap());
                        group.all_reduce(&squares, crate::libtorch::ReduceOp::Sum).unwrap();
                        for (square, grad) in Vec::<f64>::try_from(squares).unwrap().into_iter().zip(grads) {
                            let norm = grad.norm().double_value(&[]);
                            assert!((square.sqrt() - norm).abs() < 1e-5 * norm, "{square} {norm}");
                        }
                        optimizer.step(&own, 1e-2, 0.1, &go()).unwrap();
                        shards.gather_parameters(&group).unwrap();
                    }
                    let state = shards.gather_state(&group, &optimizer.state).unwrap();
                    assert_eq!(state.is_some(), rank == 0);
                    let state = state.unwrap_or(OptimizerState::AdamW(vec![]));
                    (optimizer.state.len(), found(&model, &state))
                });
                let owned: Vec<usize> = of_ranks.iter().map(|(pieces, _)| *pieces).collect();
                assert!(owned.iter().sum::<usize>() >= sizes.len() && (ranks < 6 || owned.contains(&0)), "{owned:?}");
                for (rank, (_, tensors)) in of_ranks.iter().enumerate() {
                    assert_eq!(tensors.len(), if rank == 0 { whole.len() } else { sizes.len() });
                    for (at, (ours, theirs)) in tensors.iter().zip(&whole).enumerate() {
                        assert!(ours.equal(theirs), "{name:?}: tensor {at} of rank {rank} of {ranks}");
                    }
                }
            }
        }
    }

    #[test]
    fn the_ranks_matrices_are_those_of_the_model_each_value_once() {
        let sizes: [&[i64]; 6] = [&[4, 3], &[3], &[5, 120], &[1], &[2, 2], &[700]];
        for ranks in 1..=12 {
            for rank in 0..ranks {
                let params = sizes.map(|size| Tensor::ones(size, CPU).set_requires_grad(true));
                let shards = Shards::new(params.each_ref().map(Tensor::shallow_clone).into(), rank, ranks).unwrap();
                let _no_grad = tch::no_grad_guard();
                for mut view in shards.matrices() {
                    let _ = view.g_add_scalar_(1.0);
                }
                for (index, param) in params.iter().enumerate() {
                    let own = shards.pieces.iter().find(|piece| piece.param == index);
                    let expected = Tensor::ones([param.numel() as i64], CPU);
                    if let Some(piece) = own.filter(|_| param.dim() >= 2) {
                        let _ = expected.narrow(0, piece.start, piece.len).fill_(2.0);
                    }
                    assert!(param.detach().view([-1]).equal(&expected), "{ranks} ranks, rank {rank}, {index}");
                }
                // What lies between parameters is none.
                let all = shards.params.sum(Kind::Float).double_value(&[]);
                let of_params: f64 = params.iter().map(|param| param.sum(Kind::Float).double_value(&[])).sum();
                assert_eq!(all, of_params);
            }
        }
    }
}

//! The optimizer's state sharded over ranks: ZeRO stage 1 (Rajbhandari et al. 2020, arXiv 1910.02054).
//!
//! All parameters lie one behind the other in one flat tensor, and so do their gradients; both are padded to a
//! multiple of the number of ranks N. A step is: reduce-scatter (each rank gets the mean gradient of its N-th
//! part), AdamW on that part, all-gather of the parameters. So a rank keeps 1/N of the moments, 8/N bytes a
//! parameter and not 8, and sends as much as an all-reduce would.

use tch::{Device, Kind, Tensor};

use crate::libtorch::{Error, ProcessGroup, foreach_norms, mark_written, set_grad};
use crate::utils::optim::AdamWState;

/// Parameters and gradients laid out flat, and this rank's part of them.
#[derive(Debug)]
pub struct Shards {
    /// All parameters, `[N · part]`; the model's are views of it.
    params: Tensor,
    /// Handles to the model's.
    model: Vec<Tensor>,
    /// Their gradients, likewise.
    grads: Tensor,
    /// This rank's mean gradient, `[part]`.
    grad: Tensor,
    sizes: Vec<Vec<i64>>,
    rank: i64,
    ranks: i64,
}

impl Shards {
    /// Moves `params` (fp32, on one device) into one flat tensor, of which they become views.
    ///
    /// # Errors
    /// libtorch's own.
    pub fn new(mut params: Vec<Tensor>, rank: usize, ranks: usize) -> Result<Self, Error> {
        let _no_grad = tch::no_grad_guard();
        let (rank, ranks) = (rank as i64, ranks as i64);
        let device = params.first().map_or(Device::Cpu, Tensor::device);
        let sizes: Vec<Vec<i64>> = params.iter().map(Tensor::size).collect();
        let count: i64 = params.iter().map(|p| p.numel() as i64).sum();
        let part = (count + ranks - 1) / ranks;
        let zeros = |n: i64| Tensor::zeros([n], (Kind::Float, device));
        let mut shards = Self {
            params: zeros(part * ranks),
            model: vec![],
            grads: zeros(part * ranks),
            grad: zeros(part),
            sizes,
            rank,
            ranks,
        };
        let (values, grads) = (shards.views(&shards.params), shards.views(&shards.grads));
        for ((param, mut value), grad) in params.iter_mut().zip(values).zip(grads) {
            value.copy_(param);
            param.set_data(&value);
            set_grad(param, &grad)?;
        }
        shards.model = params;
        Ok(shards)
    }

    /// The parts of `flat` that belong to each parameter, in its shape.
    fn views(&self, flat: &Tensor) -> Vec<Tensor> {
        let mut start = 0;
        let view = |size: &Vec<i64>| {
            let n = size.iter().product();
            let view = flat.narrow(0, start, n).view(size.as_slice());
            start += n;
            view
        };
        self.sizes.iter().map(view).collect()
    }

    /// The part of `flat` that belongs to `rank`.
    fn part(&self, flat: &Tensor, rank: i64) -> Tensor {
        let part = flat.size()[0] / self.ranks;
        flat.narrow(0, rank * part, part)
    }

    /// This rank's part of the parameters: what its optimizer steps.
    pub fn param(&self) -> Tensor {
        self.part(&self.params, self.rank)
    }

    /// What of this rank's part belongs to parameters of two or more dimensions, as views of it.
    pub fn matrices(&self) -> Vec<Tensor> {
        let part = self.params.size()[0] / self.ranks;
        let (begin, end) = (self.rank * part, (self.rank + 1) * part);
        let mut start = 0;
        let own = |size: &Vec<i64>| {
            let (from, to) = (begin.max(start), end.min(start + size.iter().product::<i64>()));
            start += size.iter().product::<i64>();
            (size.len() >= 2 && from < to).then(|| self.params.narrow(0, from, to - from))
        };
        self.sizes.iter().filter_map(own).collect()
    }

    /// Sets all gradients to zero.
    pub fn zero_grad(&mut self) {
        let _ = self.grads.zero_();
    }

    /// This rank's part of the gradient's mean over ranks.
    ///
    /// # Errors
    /// A rank is lost.
    pub fn reduce_gradients(&mut self, group: &ProcessGroup) -> Result<Tensor, Error> {
        group.reduce_scatter(&self.grad, &self.grads)?;
        let _ = self.grad.g_div_scalar_(self.ranks as f64);
        Ok(self.grad.shallow_clone())
    }

    /// This rank's share of each parameter's squared gradient norm, once gradients are reduced: fp64 `[P]` for P
    /// parameters. The sum over ranks is the whole.
    ///
    /// # Errors
    /// libtorch's own.
    pub fn squared_norms(&self) -> Result<Tensor, Error> {
        let part = self.grad.size()[0];
        let (from, to) = (self.rank * part, (self.rank + 1) * part);
        // Parameters lie one behind the other: those of this part, too.
        let (mut start, mut first, mut pieces) = (0, 0, vec![]);
        for (index, size) in (0..).zip(&self.sizes) {
            let end = start + size.iter().product::<i64>();
            let (own_start, own_end) = (from.max(start), to.min(end));
            if own_start < own_end {
                first = if pieces.is_empty() { index } else { first };
                pieces.push(self.grad.narrow(0, own_start - from, own_end - own_start));
            }
            start = end;
        }
        let squares = Tensor::zeros([self.sizes.len() as i64], (Kind::Double, self.grad.device()));
        if !pieces.is_empty() {
            let norms = foreach_norms(&pieces)?.to_kind(Kind::Double);
            squares.narrow(0, first, pieces.len() as i64).copy_(&norms.square());
        }
        Ok(squares)
    }

    /// After each rank has stepped its part: gives every rank all of them.
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
    pub fn gather_state(&self, group: &ProcessGroup, own: &AdamWState) -> Result<Vec<AdamWState>, Error> {
        let _no_grad = tch::no_grad_guard();
        let whole = |own: &Tensor| -> Result<Vec<Tensor>, Error> {
            let flat = (self.rank == 0).then(|| Tensor::zeros(self.params.size(), (Kind::Float, Device::Cpu)));
            for rank in 0..self.ranks {
                let part = if rank == self.rank { own.shallow_clone() } else { own.zeros_like() };
                group.broadcast(&[part.shallow_clone()], rank as usize)?;
                if let Some(flat) = &flat {
                    self.part(flat, rank).copy_(&part);
                }
            }
            Ok(flat.map_or(vec![], |flat| self.views(&flat)))
        };
        let (exp_avg, exp_avg_sq) = (whole(&own.exp_avg)?, whole(&own.exp_avg_sq)?);
        let moments = exp_avg.into_iter().zip(exp_avg_sq);
        let step = own.step.to_device(Device::Cpu);
        Ok(moments.map(|(exp_avg, exp_avg_sq)| AdamWState { step: step.copy(), exp_avg, exp_avg_sq }).collect())
    }

    /// Gives each rank its part of rank 0's whole state.
    ///
    /// # Errors
    /// A rank is lost.
    pub fn scatter_state(
        &self,
        group: &ProcessGroup,
        whole: Option<&[AdamWState]>,
        own: &AdamWState,
    ) -> Result<(), Error> {
        let _no_grad = tch::no_grad_guard();
        let spread = |to: &Tensor, field: fn(&AdamWState) -> &Tensor| {
            let flat = whole.map(|whole| {
                let flat = Tensor::zeros(self.params.size(), (Kind::Float, Device::Cpu));
                self.views(&flat).iter_mut().zip(whole).for_each(|(view, state)| view.copy_(field(state)));
                flat
            });
            for rank in 0..self.ranks {
                let mut part = to.zeros_like();
                if let Some(flat) = &flat {
                    part.copy_(&self.part(flat, rank));
                }
                group.broadcast(&[part.shallow_clone()], 0)?;
                if rank == self.rank {
                    to.shallow_clone().copy_(&part);
                }
            }
            Ok::<(), Error>(())
        };
        spread(&own.exp_avg, |s| &s.exp_avg)?;
        spread(&own.exp_avg_sq, |s| &s.exp_avg_sq)?;
        if let Some(first) = whole.and_then(|whole| whole.first()) {
            own.step.shallow_clone().copy_(&first.step);
        }
        group.broadcast(&[own.step.shallow_clone()], 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ranks_matrices_are_those_of_the_model_each_value_once() {
        let sizes: [&[i64]; 5] = [&[4, 3], &[3], &[5, 3], &[1], &[2, 2]];
        for ranks in 1..=9 {
            let model = || sizes.map(|size| Tensor::ones(size, (Kind::Float, Device::Cpu)).set_requires_grad(true));
            let mut seen = Tensor::zeros([0], (Kind::Float, Device::Cpu));
            for rank in 0..ranks {
                let params = model();
                let shards = Shards::new(params.each_ref().map(Tensor::shallow_clone).into(), rank, ranks).unwrap();
                let _no_grad = tch::no_grad_guard();
                for mut view in shards.matrices() {
                    let _ = view.g_add_scalar_(1.0);
                }
                let part = shards.param();
                assert!(part.numel() > 0 && part.is_contiguous());
                seen = Tensor::cat(&[seen, part], 0);
            }
            let expected =
                sizes.map(|size| Tensor::full([size.iter().product()], size.len() as i64, (Kind::Float, Device::Cpu)));
            let expected = Tensor::cat(&expected, 0);
            assert!(seen.narrow(0, 0, expected.size()[0]).equal(&expected), "{ranks} ranks: {seen}");
            // The padding is no parameter.
            assert_eq!(seen.sum(Kind::Float).double_value(&[]), expected.sum(Kind::Float).double_value(&[]));
        }
    }
}

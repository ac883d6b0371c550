//! What many ranks do together in a step: average gradients, by c10d's Reducer or in shards, and decide as one.

use std::rc::Rc;

use tch::{Device, Kind, Tensor};

use super::ddp::{Ddp, DdpError};
use super::zero::Shards;
use crate::config::{DdpConfig, OptimConfig};
use crate::libtorch::{Error, ProcessGroup, ReduceOp, Reducer, cpu_bytes};
use crate::utils::decay::DecayingTensors;
use crate::utils::optim::{Optimizer, OptimizerState};

/// One MiB.
const MIB: i64 = 1 << 20;

/// How gradients become one.
enum Averaging {
    /// By the Reducer, while backward runs; every rank steps all parameters.
    Reducer(Reducer),
    /// Each rank gets its part, and steps that.
    Sharded(Shards),
}

/// The ranks at work.
pub struct Parallel {
    // Dropped from top to bottom: the reducer uses the group, the group the store.
    averaging: Averaging,
    group: Rc<ProcessGroup>,
    ddp: Rc<Ddp>,
}

impl Parallel {
    /// Gives all ranks rank 0's `params` (in PyTorch's order), sees that they arrived, and makes an optimizer
    /// for what this rank steps.
    ///
    /// # Errors
    /// A rank is lost, or has other parameters.
    pub fn new(
        ddp: Rc<Ddp>,
        group: Rc<ProcessGroup>,
        params: Vec<Tensor>,
        options: &DdpConfig,
        optim: &OptimConfig,
    ) -> Result<(Self, Optimizer), DdpError> {
        ddp.collective(|| group.broadcast(&params, 0))?;
        verify(&ddp, &group, &params)?;
        let own = |source| DdpError::Lost { rank: ddp.rank(), source };
        let (averaging, optimizer) = match options.zero_stage {
            0 => {
                let reducer = Reducer::new(&group, &params, options.bucket_cap_mb * MIB).map_err(own)?;
                (Averaging::Reducer(reducer), Optimizer::new(params, optim))
            }
            _ => {
                let shards = Shards::new(params, ddp.rank(), ddp.world_size()).map_err(own)?;
                let optimizer = shards.optimizer(optim);
                (Averaging::Sharded(shards), optimizer)
            }
        };
        Ok((Self { averaging, group, ddp }, optimizer))
    }

    /// What of the parameters that this rank steps decays where only matrices do; `params` are the model's.
    pub fn decaying_matrices(&self, params: &[Tensor]) -> DecayingTensors {
        match &self.averaging {
            Averaging::Reducer(_) => DecayingTensors::matrices(params),
            Averaging::Sharded(shards) => DecayingTensors::new(shards.matrices()),
        }
    }

    /// The ranks' tie.
    pub fn ddp(&self) -> &Ddp {
        &self.ddp
    }

    /// Whether this is rank 0, which writes.
    pub fn is_main(&self) -> bool {
        self.ddp.rank() == 0
    }

    /// Puts the Reducer's buckets in the order in which gradients come, which `backward`, a run of the model's,
    /// shows. Before the first step, so that a resumed run sums in the same order as an uninterrupted one.
    ///
    /// # Errors
    /// A rank is lost.
    pub fn arrange_buckets(&self, backward: impl FnOnce() -> Result<(), DdpError>) -> Result<(), DdpError> {
        let Averaging::Reducer(reducer) = &self.averaging else { return Ok(()) };
        self.ddp.collective(|| reducer.prepare_for_forward())?;
        self.ddp.collective(|| reducer.prepare_for_backward())?;
        backward()?;
        self.ddp.collective(|| reducer.rebuild_buckets())
    }

    /// Before the forward whose backward completes the gradients.
    ///
    /// # Errors
    /// libtorch's own.
    pub fn prepare_for_forward(&self) -> Result<(), Error> {
        match &self.averaging {
            Averaging::Reducer(reducer) => reducer.prepare_for_forward(),
            Averaging::Sharded(_) => Ok(()),
        }
    }

    /// Between that forward and its backward.
    ///
    /// # Errors
    /// libtorch's own.
    pub fn prepare_for_backward(&self) -> Result<(), Error> {
        match &self.averaging {
            Averaging::Reducer(reducer) => reducer.prepare_for_backward(),
            Averaging::Sharded(_) => Ok(()),
        }
    }

    /// Sets all gradients to zero.
    pub fn zero_grad(&mut self, optimizer: &mut Optimizer) {
        match &mut self.averaging {
            Averaging::Reducer(_) => optimizer.zero_grad(),
            Averaging::Sharded(shards) => shards.zero_grad(),
        }
    }

    /// The gradients that this rank's optimizer steps with, averaged over ranks.
    ///
    /// # Errors
    /// A rank is lost.
    pub fn gradients(&mut self, optimizer: &Optimizer) -> Result<Vec<Tensor>, DdpError> {
        match &mut self.averaging {
            Averaging::Reducer(_) => Ok(optimizer.gradients()),
            Averaging::Sharded(shards) => self.ddp.collective(|| shards.reduce_gradients(&self.group)),
        }
    }

    /// Makes the micro-batches' loss, the gradient's norm, whether a gradient is not finite, and each of `requests`
    /// (to stop, to save) the same on every rank: the mean, the norm over all parts, and whether on any rank. One small
    /// all-reduce. All fp32 `[]` on the model's device; `norm` (of no gradients: on any device) and `found_inf` are of
    /// this rank's gradients. If their `norms` are given, one each, the same message carries what the norm of each
    /// parameter's gradient is made of, where no rank has it whole.
    ///
    /// # Errors
    /// A rank is lost.
    pub fn agree(
        &self,
        loss: &Tensor,
        norm: &Tensor,
        found_inf: &Tensor,
        requests: [bool; 2],
        norms: Option<&Tensor>,
    ) -> Result<Agreed, DdpError> {
        let squared = norm.to_device(loss.device()).to_kind(Kind::Double).square();
        let requests = Tensor::from_slice(&requests.map(f64::from)).to_device(loss.device());
        let of_rank = [loss.to_kind(Kind::Double), squared, found_inf.to_kind(Kind::Double)];
        let mut sums = Tensor::cat(&[Tensor::stack(&of_rank, 0), requests], 0);
        let squared_norms = match &self.averaging {
            Averaging::Sharded(shards) => norms.map(|norms| shards.squared_norms(norms)),
            Averaging::Reducer(_) => None,
        };
        if let Some(squared_norms) = &squared_norms {
            sums = Tensor::cat(&[&sums, squared_norms], 0);
        }
        self.ddp.collective(|| self.group.all_reduce(&sums, ReduceOp::Sum))?;
        let norm = match &self.averaging {
            // Every rank has the whole gradient, the same.
            Averaging::Reducer(_) => norm.shallow_clone(),
            Averaging::Sharded(_) => sums.get(1).sqrt().to_kind(Kind::Float),
        };
        Ok(Agreed {
            loss: (sums.get(0) / self.ddp.world_size() as f64).to_kind(Kind::Float),
            norm,
            found_inf: sums.get(2).gt(0.0).to_kind(Kind::Float),
            requests: sums.narrow(0, 3, 2),
            norms: squared_norms.map(|_| sums.narrow(0, 5, sums.size()[0] - 5).sqrt()),
        })
    }

    /// After the optimizer's step: gives every rank all parameters.
    ///
    /// # Errors
    /// A rank is lost.
    pub fn after_step(&self) -> Result<(), DdpError> {
        match &self.averaging {
            Averaging::Reducer(_) => Ok(()),
            Averaging::Sharded(shards) => self.ddp.collective(|| shards.gather_parameters(&self.group)),
        }
    }

    /// The sum over ranks of each of the values in `values`, which stay on their device.
    ///
    /// # Errors
    /// A rank is lost.
    pub fn sum_on_device(&self, values: &Tensor) -> Result<(), DdpError> {
        self.ddp.collective(|| self.group.all_reduce(values, ReduceOp::Sum))
    }

    /// The sum over ranks of each of `values`.
    ///
    /// # Errors
    /// A rank is lost.
    pub fn sum(&self, values: &[f64], device: Device) -> Result<Vec<f64>, DdpError> {
        if values.is_empty() {
            return Ok(vec![]);
        }
        let sums = Tensor::from_slice(values).to_device(device);
        self.ddp.collective(|| self.group.all_reduce(&sums, ReduceOp::Sum))?;
        let mut values = values.to_vec();
        sums.to_device(Device::Cpu).copy_data(&mut values, sums.numel());
        Ok(values)
    }

    /// The whole state of the optimizer, for a checkpoint, on rank 0. All ranks take part. None where this
    /// rank's optimizer has the whole state anyway.
    ///
    /// # Errors
    /// A rank is lost.
    pub fn gather_state(&self, optimizer: &Optimizer) -> Result<Option<OptimizerState>, DdpError> {
        match &self.averaging {
            Averaging::Reducer(_) => Ok(None),
            Averaging::Sharded(shards) => self.ddp.collective(|| shards.gather_state(&self.group, &optimizer.state)),
        }
    }

    /// Gives every rank its part of rank 0's state, `whole`, which is none on the other ranks.
    ///
    /// # Errors
    /// A rank is lost.
    pub fn spread_state(&self, whole: Option<OptimizerState>, optimizer: &mut Optimizer) -> Result<(), DdpError> {
        match &self.averaging {
            Averaging::Reducer(_) => {
                if let Some(whole) = whole {
                    optimizer.state.copy_from(&whole);
                }
                let tensors = optimizer.state.tensors();
                self.ddp.collective(|| self.group.broadcast(&tensors, 0))
            }
            Averaging::Sharded(shards) => {
                self.ddp.collective(|| shards.scatter_state(&self.group, whole.as_ref(), &mut optimizer.state))
            }
        }
    }

    /// Returns once every rank is here.
    ///
    /// # Errors
    /// A rank is lost.
    pub fn barrier(&self) -> Result<(), DdpError> {
        self.ddp.collective(|| self.group.barrier())
    }

    /// The reducer, whose times a bench reads; none where gradients are sharded.
    pub fn reducer(&self) -> Option<&Reducer> {
        match &self.averaging {
            Averaging::Reducer(reducer) => Some(reducer),
            Averaging::Sharded(_) => None,
        }
    }
}

/// What ranks agreed on after a step's backward.
pub struct Agreed {
    /// Mean loss, fp32 `[]`.
    pub loss: Tensor,
    /// L2 norm of the whole gradient, fp32 `[]`.
    pub norm: Tensor,
    /// 1 where a gradient of any rank is not finite, fp32 `[]`.
    pub found_inf: Tensor,
    /// More than 0 where any rank was asked to, fp64 `[2]`: to stop, to save.
    pub requests: Tensor,
    /// L2 norm of each parameter's gradient, fp64 `[P]`, if asked for and gradients are sharded: else this rank has them.
    pub norms: Option<Tensor>,
}

/// Sees that every rank has rank 0's parameters: their shapes and a checksum of their bytes.
fn verify(ddp: &Ddp, group: &ProcessGroup, params: &[Tensor]) -> Result<(), DdpError> {
    let mut hash = crc32fast::Hasher::new();
    for param in params {
        param.size().iter().for_each(|n| hash.update(&n.to_le_bytes()));
        hash.update(cpu_bytes(param).as_ref());
    }
    let device = params.first().map_or(Device::Cpu, Tensor::device);
    let checksum = Tensor::from_slice(&[i64::from(hash.finalize())]).to_device(device);
    let all = Tensor::zeros([ddp.world_size() as i64], (Kind::Int64, device));
    ddp.collective(|| group.all_gather(&all, &checksum))?;
    let all = Vec::<i64>::try_from(all.to_device(Device::Cpu)).unwrap_or_default();
    match all.iter().position(|&c| c != all[0]) {
        Some(rank) => Err(DdpError::Parameters { rank }),
        None => Ok(()),
    }
}

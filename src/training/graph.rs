//! `train.cuda_graph`: a micro-batch's forward and backward, recorded once and repeated.
//!
//! A step of a small model is hundreds of short kernels, which the host launches more slowly than the device runs them.
//! A graph is launched at once. Clipping and the optimizer, some dozen launches for all parameters together, stay
//! outside, and with them everything that differs from step to step: rates, decay, the scaler's decisions.

use tch::{Kind, Tensor};

use crate::libtorch::{CudaGraph, Error, mark_written};

/// Micro-batches of a shape that run as usual before it is recorded: kernels are chosen and compiled, tables made,
/// gradients placed.
const WARM_UP: u32 = 3;

/// Forward and backward of micro-batches on one GPU.
#[derive(Debug)]
pub struct BackwardGraph {
    device: usize,
    /// Shape of the tokens.
    shape: Vec<i64>,
    state: State,
}

#[derive(Debug)]
enum State {
    /// So many micro-batches have run.
    WarmingUp(u32),
    Recorded(Recorded),
    /// It cannot be recorded; why, until that is told.
    Refused(Option<Error>),
}

#[derive(Debug)]
struct Recorded {
    // First: it writes to the tensors below.
    graph: CudaGraph,
    tokens: Tensor,
    targets: Tensor,
    loss: Tensor,
}

impl BackwardGraph {
    /// Nothing is recorded yet. `device` is the number of the GPU.
    pub fn new(device: usize) -> Self {
        Self { device, shape: vec![], state: State::WarmingUp(0) }
    }

    /// The loss of a micro-batch, fp32 `[]`, whose gradients are added to those of `params`: what
    /// `work(tokens, targets)` does, by `work` itself or by its recording. The gradients must stay where they are from
    /// one call to the next. Where it cannot be recorded, `work` does it ([`BackwardGraph::take_refusal`]).
    ///
    /// # Shapes
    /// `tokens`, `targets`: `[B, T]` int64, on the device.
    ///
    /// # Errors
    /// `work`'s own, or the device's.
    pub fn run<E: From<Error> + std::fmt::Display>(
        &mut self,
        tokens: &Tensor,
        targets: &Tensor,
        params: &[Tensor],
        mut work: impl FnMut(&Tensor, &Tensor) -> Result<Tensor, E>,
    ) -> Result<Tensor, E> {
        if self.shape != tokens.size() {
            // The old recording's memory goes before the new one's is taken.
            self.state = State::WarmingUp(0);
            self.shape = tokens.size();
        }
        if let State::WarmingUp(n) = &mut self.state {
            if *n < WARM_UP {
                *n += 1;
                return work(tokens, targets);
            }
            let recorded = Recorded::new(self.device, tokens, targets, params, &mut work);
            self.state = recorded.map_or_else(|error| State::Refused(Some(error)), State::Recorded);
        }
        match &mut self.state {
            State::Recorded(recorded) => Ok(recorded.replay(tokens, targets)?),
            _ => work(tokens, targets),
        }
    }
}

impl BackwardGraph {
    /// Why micro-batches of the shape at hand are not recorded, once.
    pub fn take_refusal(&mut self) -> Option<Error> {
        match &mut self.state {
            State::Refused(why) => why.take(),
            _ => None,
        }
    }
}

impl Recorded {
    fn new<E: std::fmt::Display>(
        device: usize,
        tokens: &Tensor,
        targets: &Tensor,
        params: &[Tensor],
        work: &mut impl FnMut(&Tensor, &Tensor) -> Result<Tensor, E>,
    ) -> Result<Self, Error> {
        let (tokens, targets) = (tokens.copy(), targets.copy());
        // Quantized weights are kept from one micro-batch to the next: the recording must make its own.
        mark_written(params)?;
        let made = CudaGraph::capture(device, || {
            let loss = work(&tokens, &targets).map_err(|error| Error::new(error.to_string()))?;
            Ok(loss.to_kind(Kind::Float))
        });
        match made {
            Ok((graph, loss)) => Ok(Self { graph, tokens, targets, loss }),
            Err(error) => {
                // What it would have quantized it has not.
                mark_written(params)?;
                Err(error)
            }
        }
    }

    fn replay(&mut self, tokens: &Tensor, targets: &Tensor) -> Result<Tensor, Error> {
        self.tokens.copy_(tokens);
        self.targets.copy_(targets);
        self.graph.replay()?;
        Ok(self.loss.shallow_clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    /// Where there is no GPU, each shape is refused once, and everything is done as without a graph.
    #[test]
    fn what_cannot_be_recorded_is_done_one_by_one() {
        let device = Device::cuda_if_available();
        let param = Tensor::ones([], (Kind::Float, device)).set_requires_grad(true);
        let mut graph = BackwardGraph::new(0);
        let mut sum = 0.0;
        for (step, shape) in [[2, 3]; 6].into_iter().chain([[4, 5]; 6]).enumerate() {
            let tokens = Tensor::full(shape, step as i64, (Kind::Int64, device));
            let loss = graph.run(&tokens, &tokens, &[param.shallow_clone()], |tokens, targets| {
                let loss = (tokens + targets).to_kind(Kind::Float).sum(Kind::Float) * &param;
                loss.backward();
                Ok::<_, Error>(loss.detach())
            });
            let expected = (2 * step as i64 * shape[0] * shape[1]) as f64;
            assert_eq!(loss.expect("runs").double_value(&[]), expected, "{step}");
            sum += expected;
            assert_eq!(param.grad().double_value(&[]), sum, "{step}");
            let warming_up = step % 6 < WARM_UP as usize;
            match graph.state {
                State::WarmingUp(_) => assert!(warming_up, "{step}"),
                State::Recorded(_) => assert!(!warming_up && device.is_cuda(), "{step}"),
                State::Refused(_) => assert!(!warming_up && !device.is_cuda(), "{step}"),
            }
            let first = !device.is_cuda() && step % 6 == WARM_UP as usize;
            assert_eq!(graph.take_refusal().is_some(), first, "told once: {step}");
        }
    }
}

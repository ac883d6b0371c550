//! AdamW with moments of 8 bits: bitsandbytes' `AdamW8bit` (Dettmers et al. 2022, "8-bit Optimizers via Block-wise
//! Quantization", arXiv 2110.02861), with its state and its rules.

use tch::{Device, Kind, Tensor};

use super::Piece;
use super::adamw::{self, AdamWState};
use crate::kernels::{self, CodeBook, Moment8bit};
use crate::libtorch::{AdamWStep, Error};

/// Parameters of fewer elements keep fp32 moments.
const MIN_8BIT_SIZE: i64 = 4096;

/// The values of bitsandbytes' dynamic data type, ascending (`create_dynamic_map`): zero, one, and seven decades below
/// one, each of which is cut into twice as many parts as the one below it.
pub fn dynamic_map(signed: bool) -> [f32; 256] {
    let mut values = vec![0.0, 1.0];
    for decade in 0..7 {
        let parts = if signed { 1 << decade } else { 2 << decade };
        // The bits are those of torch.linspace(0.1, 1, parts + 1) on a CPU with fused multiply-add. libtorch's own would
        // give others on a CPU without.
        let step = (1.0 - 0.1f32) / parts as f32;
        let bound = |i: i32| match i < (parts + 1) / 2 {
            true => step.mul_add(i as f32, 0.1),
            false => (-step).mul_add((parts - i) as f32, 1.0),
        };
        for i in 0..parts {
            let value = (bound(i) + bound(i + 1)) / 2.0 * 10f64.powi(decade - 6) as f32;
            values.push(value);
            if signed {
                values.push(-value);
            }
        }
    }
    values.sort_by(f32::total_cmp);
    values.try_into().expect("254 values, zero and one")
}

/// The state of all parameters.
#[derive(Debug)]
pub struct AdamW8bit {
    /// Of each, in their order.
    pub params: Vec<AdamW8bitState>,
    /// What the codes of first and second moments stand for.
    books: [CodeBook; 2],
}

/// What bitsandbytes keeps for one parameter.
#[derive(Debug)]
pub struct AdamW8bitState {
    /// Steps taken: fp32 `[]`.
    pub step: Tensor,
    /// Its moments.
    pub moments: Moments,
}

/// The first and the second moment of a parameter.
#[derive(Debug)]
pub enum Moments {
    /// Of a small one: fp32, as the parameter.
    Full([Tensor; 2]),
    /// In 8 bits.
    Quantized([Moment8bit; 2]),
}

impl AdamW8bitState {
    /// The state of a parameter of shape `size` before the first step.
    pub fn zeros(size: &[i64], device: Device) -> Self {
        Self::zeros_within(size.iter().product(), size, device)
    }

    /// That of a piece of shape `size` of a parameter of `numel` elements, which alone decide how moments are kept.
    pub(super) fn zeros_within(numel: i64, size: &[i64], device: Device) -> Self {
        let zeros = |size: &[i64]| Tensor::zeros(size, (Kind::Float, device));
        let moments = if numel < MIN_8BIT_SIZE {
            Moments::Full([zeros(size), zeros(size)])
        } else {
            Moments::Quantized([Moment8bit::zeros(size, device), Moment8bit::zeros(size, device)])
        };
        Self { step: zeros(&[]), moments }
    }

    /// That of a piece of the parameter: views, but for the step, which is the whole's.
    pub(super) fn piece(&self, piece: Piece) -> Self {
        let moments = match &self.moments {
            Moments::Full(moments) => Moments::Full(moments.each_ref().map(|moment| piece.of(moment))),
            Moments::Quantized(moments) => {
                Moments::Quantized(moments.each_ref().map(|moment| moment.narrow(piece.start, piece.len)))
            }
        };
        Self { step: self.step.shallow_clone(), moments }
    }

    /// Handles to all tensors, the step first.
    pub fn tensors(&self) -> Vec<Tensor> {
        let moments = match &self.moments {
            Moments::Full(moments) => moments.iter().collect(),
            Moments::Quantized(moments) => moments.iter().flat_map(|m| [&m.codes, &m.absmax]).collect::<Vec<_>>(),
        };
        std::iter::once(&self.step).chain(moments).map(Tensor::shallow_clone).collect()
    }
}

impl AdamW8bit {
    /// Of these parameters, all on one device.
    pub fn new(params: Vec<AdamW8bitState>) -> Self {
        let device = params.first().map_or(Device::Cpu, |state| state.step.device());
        let book = |signed| CodeBook::new(&dynamic_map(signed), device);
        // The second moment, of squares, has no sign.
        Self { params, books: [book(true), book(false)] }
    }

    /// Of pieces of the parameters, as views.
    pub(super) fn pieces(&self, pieces: &[Piece]) -> Self {
        let params = pieces.iter().map(|piece| self.params[piece.param].piece(*piece)).collect();
        Self { params, books: self.books.each_ref().map(CodeBook::shallow_clone) }
    }

    /// The values that codes of the first and of the second moment stand for: fp32 `[256]`.
    pub fn qmaps(&self) -> [&Tensor; 2] {
        self.books.each_ref().map(CodeBook::values)
    }

    /// AdamW's state on the CPU, its moments rounded where AdamW8bit has 8 bits.
    pub(super) fn of_adamw(state: &[AdamWState]) -> Self {
        let _no_grad = tch::no_grad_guard();
        let mut rounded = Self::new(vec![]);
        let round = |from: &AdamWState| {
            let moments = match AdamW8bitState::zeros(&from.exp_avg.size(), Device::Cpu).moments {
                Moments::Full(_) => Moments::Full([from.exp_avg.copy(), from.exp_avg_sq.copy()]),
                Moments::Quantized(_) => Moments::Quantized([
                    rounded.books[0].quantize(&from.exp_avg),
                    rounded.books[1].quantize(&from.exp_avg_sq),
                ]),
            };
            AdamW8bitState { step: from.step.copy(), moments }
        };
        rounded.params = state.iter().map(round).collect();
        rounded
    }

    /// AdamW's state with the same moments.
    pub(super) fn to_adamw(&self) -> Vec<AdamWState> {
        let _no_grad = tch::no_grad_guard();
        let full = |from: &AdamW8bitState| {
            let [exp_avg, exp_avg_sq] = match &from.moments {
                Moments::Full(moments) => moments.each_ref().map(Tensor::copy),
                Moments::Quantized([first, second]) => {
                    [self.books[0].dequantize(first), self.books[1].dequantize(second)]
                }
            };
            AdamWState { step: from.step.copy(), exp_avg, exp_avg_sq }
        };
        self.params.iter().map(full).collect()
    }

    /// One step of `params` along `grads`, as [`super::Optimizer::step`].
    pub(super) fn step(
        &self,
        params: &[Tensor],
        grads: &[Tensor],
        step: AdamWStep,
        found_inf: &Tensor,
    ) -> Result<(), Error> {
        let (mut full, mut quantized) = (Lists::default(), Lists::default());
        let (mut small, mut moments) = (vec![], vec![]);
        for ((param, grad), state) in params.iter().zip(grads).zip(&self.params) {
            match &state.moments {
                Moments::Full([first, second]) => {
                    full.push(param, grad, state);
                    small.push(AdamWState {
                        step: state.step.shallow_clone(),
                        exp_avg: first.shallow_clone(),
                        exp_avg_sq: second.shallow_clone(),
                    });
                }
                Moments::Quantized([first, second]) => {
                    quantized.push(param, grad, state);
                    moments.push([first, second]);
                }
            }
        }
        if !small.is_empty() {
            adamw::step(&full.params, &full.grads, &small, step, found_inf)?;
        }
        let books = [&self.books[0], &self.books[1]];
        kernels::adamw8bit(&quantized.params, &quantized.grads, &moments, &quantized.steps, books, step, found_inf)
    }
}

/// The parameters that keep one kind of moments.
#[derive(Default)]
struct Lists {
    params: Vec<Tensor>,
    grads: Vec<Tensor>,
    steps: Vec<Tensor>,
}

impl Lists {
    fn push(&mut self, param: &Tensor, grad: &Tensor, state: &AdamW8bitState) {
        self.params.push(param.shallow_clone());
        self.grads.push(grad.shallow_clone());
        self.steps.push(state.step.shallow_clone());
    }
}

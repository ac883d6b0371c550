//! What ternary training looks like from inside, every so many steps: each layer's weights in their three values, how
//! many of them changed, how large its inputs were, and the norm of its gradient.
//!
//! Everything is of one step: the weights that its forward multiplied with, the inputs of all its micro-batches, its
//! gradient before clipping. It is gathered on the device as one tensor and arrives with the step's loss, so that the
//! host waits for nothing.

use tch::{Kind, Tensor};

use super::metrics::{InternalsRow, LayerRow};
use crate::models::BitByteLM;

/// Numbers of a quantized layer: its weights that are not zero, their sum, those that changed, gamma; the largest and
/// the mean absmax of its input's rows.
const PER_LAYER: usize = 6;

/// Reports on a run, one after the other.
#[derive(Debug)]
pub struct Internals {
    /// 0: none.
    every: u64,
    /// In the order of the parameters, of which each layer has one.
    layers: Vec<Layer>,
}

#[derive(Debug)]
struct Layer {
    name: String,
    quantized: Option<Quantized>,
}

#[derive(Debug)]
struct Quantized {
    /// Number of weights.
    weights: f64,
    /// Their codes at the last report.
    codes: Option<Tensor>,
}

impl Internals {
    /// Every `every` steps (0: never), of a model with these parameters, by PyTorch's names and in its order.
    pub fn new(every: u64, parameters: &[String], model: &BitByteLM) -> Self {
        let quantized = model.layers();
        let layer = |parameter: &String| {
            let name = parameter.strip_suffix(".weight").unwrap_or(parameter).to_string();
            let layer = quantized.iter().find(|(quantized, _)| *quantized == name).map(|(_, layer)| layer);
            Layer {
                quantized: layer
                    .map(|l| Quantized { weights: l.weight().map_or(0, Tensor::numel) as f64, codes: None }),
                name,
            }
        };
        Self { every, layers: parameters.iter().map(layer).collect() }
    }

    /// Whether step `step`, the first being 0, is reported.
    pub fn is_due(&self, step: u64) -> bool {
        self.every > 0 && step.is_multiple_of(self.every)
    }

    /// What [`Internals::row`] reads: fp64 `[P + 6 Q]` on the model's device, for P parameters and Q quantized layers.
    /// To be called before the optimizer's step. `norms`: those of the parameters' gradients, `[P]`.
    pub fn gather(&mut self, model: &BitByteLM, inputs: &Inputs, norms: &Tensor) -> Tensor {
        let _no_grad = tch::no_grad_guard();
        let unknown = || Tensor::full([], f64::NAN, (Kind::Double, norms.device()));
        let mut weights = Vec::new();
        let quantized = self.layers.iter_mut().filter_map(|layer| layer.quantized.as_mut());
        for (of, (_, layer)) in quantized.zip(model.layers()) {
            let numbers = match layer.ternary() {
                None => [None, None, None, None],
                Some((codes, gamma)) => {
                    let flips = of.codes.as_ref().map(|last| codes.ne_tensor(last).count_nonzero(None));
                    let numbers = [Some(codes.count_nonzero(None)), Some(codes.sum(Kind::Int64)), flips, Some(gamma)];
                    of.codes = Some(codes);
                    numbers
                }
            };
            weights.extend(numbers.map(|number| number.map_or_else(unknown, |number| number.to_kind(Kind::Double))));
        }
        let weights = Tensor::stack(&weights, 0).view([-1, 4]);
        let inputs = inputs.numbers().unwrap_or_else(|| unknown().expand([weights.size()[0], 2], false));
        let layers = Tensor::cat(&[weights, inputs], 1);
        Tensor::cat(&[norms.to_kind(Kind::Double), layers.flatten(0, -1)], 0)
    }

    /// The row of the log that these numbers make, which have arrived from the device.
    pub fn row(&self, step: u64, numbers: &[f64]) -> InternalsRow {
        let (norms, of_quantized) = numbers.split_at(self.layers.len());
        let mut of_quantized = of_quantized.as_chunks::<PER_LAYER>().0.iter();
        let known = |number: f64| number.is_finite().then_some(number);
        let row = |(layer, &grad_norm): (&Layer, &f64)| {
            let row = LayerRow { name: layer.name.clone(), grad_norm, ..LayerRow::default() };
            let Some(Quantized { weights, .. }) = &layer.quantized else { return row };
            let Some(&[nonzero, sum, flips, gamma, input_absmax, input_absmax_mean]) = of_quantized.next() else {
                return row;
            };
            LayerRow {
                zero: known((weights - nonzero) / weights),
                plus: known((nonzero + sum) / 2.0 / weights),
                minus: known((nonzero - sum) / 2.0 / weights),
                flips: known(flips / weights),
                gamma: known(gamma),
                input_absmax: known(input_absmax),
                input_absmax_mean: known(input_absmax_mean),
                ..row
            }
        };
        InternalsRow { step, layers: self.layers.iter().zip(norms).map(row).collect() }
    }
}

/// How large the inputs of the quantized layers are, over the forwards of a step.
#[derive(Debug, Default)]
pub struct Inputs {
    /// For each layer the largest absmax of a row, and the sum over forwards of the mean: `[Q]` fp32 each.
    found: Option<(Tensor, Tensor)>,
    forwards: u32,
}

impl Inputs {
    /// Runs `forward`, of `model`, and looks at what its layers read. What backward recomputes comes later, and is not
    /// seen.
    pub fn watch<T>(&mut self, model: &BitByteLM, forward: impl FnOnce() -> T) -> T {
        let layers = model.layers();
        layers.iter().for_each(|(_, layer)| layer.probe_input());
        let output = forward();
        let rows: Vec<Tensor> = layers.iter().filter_map(|(_, layer)| layer.take_input_absmax()).collect();
        let rows = Tensor::stack(&rows, 0); // [Q, N]
        let (largest, mean) = (rows.amax([1], false), rows.mean_dim([1].as_slice(), false, Kind::Float));
        self.found = Some(match self.found.take() {
            None => (largest, mean),
            Some((so_far, sum)) => (so_far.maximum(&largest), sum + mean),
        });
        self.forwards += 1;
        output
    }

    /// The largest absmax and the mean: `[Q, 2]` fp64.
    fn numbers(&self) -> Option<Tensor> {
        let (largest, sum) = self.found.as_ref()?;
        Some(Tensor::stack(&[largest, &(sum / f64::from(self.forwards))], 1).to_kind(Kind::Double))
    }
}

//! `quant.kernel: auto`: which of two implementations computes a layer, found out once per shape by timing both.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tch::{Cuda, Device, Kind};

/// So many times as fast the reference must be to be chosen. Noise then decides nothing, and a run stays repeatable.
const CLEARLY: f64 = 1.25;

/// Below so many multiplications nothing is timed: whichever it is takes microseconds.
const SMALL: i64 = 1 << 24;

/// How often each is timed, after once to warm up; the fastest counts.
const TIMES: usize = 3;

/// What the time of a layer depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shape {
    /// The device, as CPU (-1) or CUDA with its number.
    device: i64,
    kind: &'static str,
    input: u8,
    /// Rounded up to a power of two: a prompt's length needs no timing of its own.
    tokens: i64,
    inputs: i64,
    outputs: i64,
    /// Whether there is a backward.
    pub training: bool,
}

impl Shape {
    /// `input` numbers what precedes the layer.
    pub fn new(device: Device, kind: Kind, input: u8, tokens: i64, inputs: i64, outputs: i64, training: bool) -> Self {
        let device = match device {
            Device::Cuda(index) => index as i64,
            _ => -1,
        };
        let kind = match kind {
            Kind::BFloat16 => "bf16",
            Kind::Half => "fp16",
            _ => "fp32",
        };
        let tokens = (tokens.max(1) as u64).next_power_of_two() as i64;
        Self { device, kind, input, tokens, inputs, outputs, training }
    }

    fn multiplications(&self) -> i64 {
        self.tokens.saturating_mul(self.inputs).saturating_mul(self.outputs)
    }

    fn seconds(&self, run: &dyn Fn()) -> f64 {
        let timed = || {
            let began = Instant::now();
            run();
            if self.device >= 0 {
                Cuda::synchronize(self.device);
            }
            began.elapsed()
        };
        timed();
        (0..TIMES).map(|_| timed()).min().unwrap_or(Duration::MAX).as_secs_f64()
    }
}

/// Whether the fused implementation is the one for `shape`. Times both where the shape is new.
pub fn is_fused(shape: Shape, fused: &dyn Fn(), reference: &dyn Fn()) -> bool {
    static CHOSEN: Mutex<Option<HashMap<Shape, bool>>> = Mutex::new(None);
    if shape.multiplications() < SMALL {
        return true;
    }
    let known = |chosen: &Option<HashMap<Shape, bool>>| chosen.as_ref().and_then(|map| map.get(&shape).copied());
    // Not held while timing, in which layers are run.
    let chosen = known(&CHOSEN.lock().unwrap_or_else(PoisonError::into_inner));
    chosen.unwrap_or_else(|| {
        let (fused, reference) = (shape.seconds(fused), shape.seconds(reference));
        let is_fused = fused <= CLEARLY * reference;
        tracing::debug!(?shape, fused, reference, is_fused, "timed both implementations of a layer");
        let mut chosen = CHOSEN.lock().unwrap_or_else(PoisonError::into_inner);
        *chosen.get_or_insert_default().entry(shape).or_insert(is_fused)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn the_reference_is_taken_only_where_it_is_clearly_faster_and_each_shape_is_timed_once() {
        let runs = AtomicUsize::new(0);
        let takes = |ms: u64| {
            let runs = &runs;
            move || {
                runs.fetch_add(1, Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(ms));
            }
        };
        // No layer has such an input: the shapes are these tests' own.
        let shape = |outputs| Shape::new(Device::Cpu, Kind::Float, 255, 4096, 4096, outputs, true);
        assert!(is_fused(shape(1), &takes(20), &takes(19)));
        assert!(is_fused(shape(2), &takes(2), &takes(20)));
        assert!(!is_fused(shape(3), &takes(40), &takes(2)));
        let timed = runs.load(Ordering::Relaxed);
        assert!(!is_fused(shape(3), &takes(2), &takes(40)));
        // Another length of about that size is the same shape; a small layer is none.
        assert!(!is_fused(Shape::new(Device::Cpu, Kind::Float, 255, 3000, 4096, 3, true), &takes(2), &takes(40)));
        assert!(is_fused(Shape::new(Device::Cpu, Kind::Float, 255, 4, 64, 64, true), &takes(40), &takes(2)));
        assert_eq!(runs.load(Ordering::Relaxed), timed);
    }
}

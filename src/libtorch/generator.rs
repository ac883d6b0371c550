//! libtorch's random number generator on the CPU, of which the process has one.

use std::cell::Cell;
use std::sync::{Mutex, PoisonError};

static GENERATOR: Mutex<()> = Mutex::new(());

thread_local! {
    static IS_HELD: Cell<bool> = const { Cell::new(false) };
}

/// Runs `f`, which draws random numbers, while no other thread may: a seed then gives one sequence, whatever other
/// threads draw. Calls may be nested.
pub fn drawing_alone<T>(f: impl FnOnce() -> T) -> T {
    /// Gives the generator back, also if `f` panics.
    struct Held;
    impl Drop for Held {
        fn drop(&mut self) {
            IS_HELD.set(false);
        }
    }
    if IS_HELD.get() {
        return f();
    }
    let _lock = GENERATOR.lock().unwrap_or_else(PoisonError::into_inner);
    IS_HELD.set(true);
    let _held = Held;
    f()
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind, Tensor};

    #[test]
    fn a_seed_gives_one_sequence_whatever_other_threads_draw() {
        let draw = || Tensor::randn([3], (Kind::Float, Device::Cpu));
        let seeded = || {
            drawing_alone(|| {
                tch::manual_seed(5);
                // Nested, as a layer in a model.
                (0..200).map(|_| drawing_alone(draw)).collect::<Vec<_>>()
            })
        };
        let is_done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !is_done.load(std::sync::atomic::Ordering::SeqCst) {
                    let _ = drawing_alone(draw);
                }
            });
            let runs: Vec<_> = (0..20).map(|_| Tensor::stack(&seeded(), 0)).collect();
            is_done.store(true, std::sync::atomic::Ordering::SeqCst);
            assert!(runs.iter().all(|run| run.equal(&runs[0])));
        });
        let panicked = std::panic::catch_unwind(|| drawing_alone(|| panic!("told to")));
        assert!(panicked.is_err() && drawing_alone(|| true));
    }
}

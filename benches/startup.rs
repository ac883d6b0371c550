//! How long `bbt` takes to start: `--help`, and `doctor`, which loads all of libtorch's state.
//!
//!   cargo bench --bench startup

use std::process::{Command, Stdio};
use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};

fn startup(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("startup");
    group.sample_size(20).measurement_time(Duration::from_secs(10));
    for argument in ["--help", "doctor"] {
        group.bench_function(argument, |bencher| {
            bencher.iter(|| {
                let mut command = Command::new(env!("CARGO_BIN_EXE_bbt"));
                let status = command.arg(argument).stdout(Stdio::null()).stderr(Stdio::null()).status();
                assert!(status.is_ok_and(|status| status.success()), "bbt {argument} fails");
            });
        });
    }
    group.finish();
}

criterion_group!(benches, startup);
criterion_main!(benches);

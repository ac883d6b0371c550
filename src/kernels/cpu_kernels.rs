//! Which of the CPU kernels (`cpu/`) this machine runs.

use std::sync::OnceLock;

use crate::libtorch::Error;

/// Environment variable that asks for other kernels than the best, to compare them.
pub const VARIABLE: &str = "BBT_CPU_KERNELS";

/// An instruction set that kernels are compiled for. Each includes those before it. Its number is that of
/// `shim/numbers.h`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(i32)]
pub enum CpuKernels {
    /// What every CPU has.
    Portable,
    /// AVX2 and FMA.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
    /// AVX-512 with products of bytes.
    Avx512Vnni,
    /// AVX-512 with products and permutations of bytes.
    Avx512Vbmi,
    /// AVX-512 with all that and products of bf16.
    Avx512Bf16,
}

impl CpuKernels {
    /// All, the best last.
    pub const ALL: [Self; 6] =
        [Self::Portable, Self::Avx2, Self::Avx512, Self::Avx512Vnni, Self::Avx512Vbmi, Self::Avx512Bf16];

    /// The best that this CPU runs, or what `BBT_CPU_KERNELS` asks for.
    ///
    /// # Errors
    /// A value that is none of the names, or kernels that this CPU does not run.
    pub fn chosen() -> Result<Self, Error> {
        static CHOSEN: OnceLock<Result<CpuKernels, String>> = OnceLock::new();
        let chosen = CHOSEN.get_or_init(|| match std::env::var_os(VARIABLE) {
            None => Ok(Self::best()),
            Some(name) => Self::named(&name.to_string_lossy()),
        });
        chosen.clone().map_err(Error::Other)
    }

    /// The best that this CPU runs.
    pub fn best() -> Self {
        *Self::ALL.iter().rfind(|kernels| kernels.runs_here()).expect("portable kernels run anywhere")
    }

    fn named(name: &str) -> Result<Self, String> {
        let names = || Self::ALL.iter().filter(|k| k.runs_here()).map(|k| k.name()).collect::<Vec<_>>().join(", ");
        match Self::ALL.into_iter().find(|kernels| kernels.name() == name) {
            None => Err(format!("{VARIABLE}={name}: no such kernels; this CPU runs {}", names())),
            Some(kernels) if !kernels.runs_here() => {
                Err(format!("{VARIABLE}={name}: this CPU does not run them, only {}", names()))
            }
            Some(kernels) => Ok(kernels),
        }
    }

    /// As in `BBT_CPU_KERNELS`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Avx512Vnni => "avx512vnni",
            Self::Avx512Vbmi => "avx512vbmi",
            Self::Avx512Bf16 => "avx512bf16",
        }
    }

    /// Whether this CPU has the instructions.
    #[cfg(target_arch = "x86_64")]
    pub fn runs_here(self) -> bool {
        use std::arch::is_x86_feature_detected as has;
        match self {
            Self::Portable => true,
            Self::Avx2 => has!("avx2") && has!("fma"),
            Self::Avx512 => {
                Self::Avx2.runs_here() && has!("avx512f") && has!("avx512bw") && has!("avx512dq") && has!("avx512vl")
            }
            Self::Avx512Vnni => Self::Avx512.runs_here() && has!("avx512vnni"),
            Self::Avx512Vbmi => Self::Avx512Vnni.runs_here() && has!("avx512vbmi"),
            Self::Avx512Bf16 => Self::Avx512Vbmi.runs_here() && has!("avx512bf16"),
        }
    }

    /// Whether this CPU has the instructions.
    #[cfg(not(target_arch = "x86_64"))]
    pub fn runs_here(self) -> bool {
        self == Self::Portable
    }
}

#[cfg(test)]
pub(in crate::kernels) mod tests {
    use super::*;
    use std::io::Write;
    use std::sync::Once;

    /// The instruction sets that tests can compare here. Said once, past the test runner, which hides what tests print:
    /// a set that this CPU has not is not tested.
    pub fn runnable() -> impl Iterator<Item = CpuKernels> {
        static SAID: Once = Once::new();
        SAID.call_once(|| {
            let names = |here: bool| {
                let names: Vec<_> =
                    CpuKernels::ALL.iter().filter(|k| k.runs_here() == here).map(|k| k.name()).collect();
                if names.is_empty() { "none".into() } else { names.join(", ") }
            };
            let said = format!("CPU kernels tested: {}; not run, this CPU has not: {}\n", names(true), names(false));
            std::io::stderr().write_all(said.as_bytes()).expect("stderr");
        });
        CpuKernels::ALL.into_iter().filter(|kernels| kernels.runs_here())
    }

    #[test]
    fn names_are_those_of_the_variable() {
        for kernels in CpuKernels::ALL.into_iter().filter(|k| k.runs_here()) {
            assert_eq!(CpuKernels::named(kernels.name()), Ok(kernels));
        }
        let error = CpuKernels::named("sse9").unwrap_err();
        assert!(error.starts_with("BBT_CPU_KERNELS=sse9: ") && error.contains("portable"), "{error}");
    }
}

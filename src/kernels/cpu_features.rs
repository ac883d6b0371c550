//! What this CPU can do, as a set, from which each operation takes the best kernel that it can run (`cpu/features.h`).

use std::fmt;
use std::sync::OnceLock;

use super::ffi::{self, CpuOperation};
use crate::libtorch::Error;

/// The environment variable that masks features, to compare kernels or to compute as another CPU would.
pub const VARIABLE: &str = "BBT_CPU_KERNELS";

/// An extension of the instruction set that kernels may need. Numbered as in `cpu/features.h`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub enum CpuFeature {
    /// 256-bit integer vectors.
    Avx2,
    /// Fused multiply-add.
    Fma,
    /// 512-bit vectors.
    Avx512F,
    /// 512-bit vectors of bytes and words.
    Avx512Bw,
    /// More operations on 512-bit vectors of 32 and 64 bits.
    Avx512Dq,
    /// AVX-512's operations on shorter vectors.
    Avx512Vl,
    /// Products of bytes.
    Avx512Vnni,
    /// Permutations of bytes.
    Avx512Vbmi,
    /// Products of bfloat16.
    Avx512Bf16,
    /// Arithmetic in float16.
    Avx512Fp16,
    /// Products of bytes on 256-bit vectors, without AVX-512.
    AvxVnni,
    /// Tiles of bytes.
    AmxInt8,
    /// Tiles of bfloat16.
    AmxBf16,
    /// ARM's 128-bit vectors.
    Neon,
}

/// All features, by the names that `BBT_CPU_KERNELS` takes.
const NAMES: [(CpuFeature, &str); 14] = [
    (CpuFeature::Avx2, "avx2"),
    (CpuFeature::Fma, "fma"),
    (CpuFeature::Avx512F, "avx512f"),
    (CpuFeature::Avx512Bw, "avx512bw"),
    (CpuFeature::Avx512Dq, "avx512dq"),
    (CpuFeature::Avx512Vl, "avx512vl"),
    (CpuFeature::Avx512Vnni, "avx512vnni"),
    (CpuFeature::Avx512Vbmi, "avx512vbmi"),
    (CpuFeature::Avx512Bf16, "avx512bf16"),
    (CpuFeature::Avx512Fp16, "avx512fp16"),
    (CpuFeature::AvxVnni, "avxvnni"),
    (CpuFeature::AmxInt8, "amx_int8"),
    (CpuFeature::AmxBf16, "amx_bf16"),
    (CpuFeature::Neon, "neon"),
];

const AVX2: CpuFeatures = CpuFeatures::of(&[CpuFeature::Avx2, CpuFeature::Fma]);
pub(super) const AVX512: CpuFeatures =
    AVX2.and(CpuFeatures::of(&[CpuFeature::Avx512F, CpuFeature::Avx512Bw, CpuFeature::Avx512Dq, CpuFeature::Avx512Vl]));
const AVX512VNNI: CpuFeatures = AVX512.and(CpuFeatures::of(&[CpuFeature::Avx512Vnni]));
const AVX512VBMI: CpuFeatures = AVX512VNNI.and(CpuFeatures::of(&[CpuFeature::Avx512Vbmi]));
const AVX512BF16: CpuFeatures = AVX512VBMI.and(CpuFeatures::of(&[CpuFeature::Avx512Bf16]));

/// Sets that have a name of their own in `BBT_CPU_KERNELS`; each of these includes those before it.
const LEVELS: [(&str, CpuFeatures); 6] = [
    ("portable", CpuFeatures::of(&[])),
    ("avx2", AVX2),
    ("avx512", AVX512),
    ("avx512vnni", AVX512VNNI),
    ("avx512vbmi", AVX512VBMI),
    ("avx512bf16", AVX512BF16),
];

/// A set of features.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct CpuFeatures(u32);

impl CpuFeatures {
    const fn of(features: &[CpuFeature]) -> Self {
        let mut bits = 0;
        let mut i = 0;
        while i < features.len() {
            bits |= 1 << features[i] as u32;
            i += 1;
        }
        Self(bits)
    }

    const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// As it crosses the C interface.
    pub(super) fn bits(self) -> u32 {
        self.0
    }

    /// Whether all of `other` is in this set.
    pub fn has(self, other: Self) -> bool {
        other.0 & !self.0 == 0
    }

    /// What kernels may use: the features of this CPU, or those of them that `BBT_CPU_KERNELS` names.
    ///
    /// # Errors
    /// The variable names something unknown, or a feature that this CPU does not have.
    pub fn chosen() -> Result<Self, Error> {
        static CHOSEN: OnceLock<Result<CpuFeatures, String>> = OnceLock::new();
        let chosen = CHOSEN.get_or_init(|| match std::env::var_os(VARIABLE) {
            None => Ok(Self::detected()),
            Some(value) => Self::parse(&value.to_string_lossy(), Self::detected()),
        });
        chosen.clone().map_err(Error::Other)
    }

    /// The features of this CPU.
    pub fn detected() -> Self {
        static DETECTED: OnceLock<CpuFeatures> = OnceLock::new();
        *DETECTED.get_or_init(|| {
            let present: Vec<_> =
                NAMES.iter().filter(|(_, name)| is_present(name)).map(|&(feature, _)| feature).collect();
            Self::of(&present)
        })
    }

    /// The set that `value` of the variable means on a CPU that has `detected`.
    fn parse(value: &str, detected: Self) -> Result<Self, String> {
        let feature =
            |name: &str| NAMES.iter().find(|(_, known)| *known == name).map(|&(feature, _)| Self::of(&[feature]));
        let level = |name: &str| LEVELS.iter().find(|(known, _)| *known == name).map(|&(_, set)| set);
        let levels: Vec<_> = LEVELS.iter().filter(|(_, set)| detected.has(*set)).map(|(name, _)| *name).collect();
        let remedy =
            || format!("use best, {}, or features of this CPU ({detected}) with commas between", levels.join(", "));
        if value == "best" {
            return Ok(detected);
        }
        let set = match value.split_once(',') {
            None => level(value).or_else(|| feature(value)),
            Some(_) => {
                value.split(',').map(|name| feature(name.trim())).try_fold(Self(0), |set, one| Some(set.and(one?)))
            }
        };
        match set {
            None => Err(format!("{VARIABLE}={value}: no such kernels or feature; {}", remedy())),
            Some(set) if !detected.has(set) => {
                let missing = Self(set.0 & !detected.0);
                Err(format!("{VARIABLE}={value}: this CPU does not have {missing}; {}", remedy()))
            }
            Some(set) => Ok(set),
        }
    }

    /// The names of the kernels that operations take with these features, by what they compute.
    pub fn kernels(self) -> [(&'static str, &'static str); 5] {
        [
            ("int8 products", CpuOperation::Int8Product),
            ("rows", CpuOperation::Rows),
            ("fp32 attention", CpuOperation::AttentionFloat),
            ("bf16 attention", CpuOperation::AttentionBFloat16),
            ("adamw8bit", CpuOperation::AdamW8bit),
        ]
        .map(|(name, operation)| (name, ffi::cpu_kernel(self, operation)))
    }
}

/// The names, with spaces between.
impl fmt::Display for CpuFeatures {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let has = |feature: CpuFeature| self.has(Self::of(&[feature]));
        let names: Vec<_> = NAMES.iter().filter(|(feature, _)| has(*feature)).map(|(_, name)| *name).collect();
        f.write_str(&if names.is_empty() { "none".into() } else { names.join(" ") })
    }
}

impl fmt::Debug for CpuFeatures {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "[{self}]")
    }
}

#[cfg(target_arch = "x86_64")]
fn is_present(name: &str) -> bool {
    use std::arch::is_x86_feature_detected as has;
    match name {
        "avx2" => has!("avx2"),
        "fma" => has!("fma"),
        "avx512f" => has!("avx512f"),
        "avx512bw" => has!("avx512bw"),
        "avx512dq" => has!("avx512dq"),
        "avx512vl" => has!("avx512vl"),
        "avx512vnni" => has!("avx512vnni"),
        "avx512vbmi" => has!("avx512vbmi"),
        "avx512bf16" => has!("avx512bf16"),
        "avx512fp16" => has!("avx512fp16"),
        "avxvnni" => has!("avxvnni"),
        // The standard library does not detect tiles yet. The kernel lists them if it saves their state, too.
        "amx_int8" | "amx_bf16" => {
            let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
            let flags = info.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
            flags.split_whitespace().any(|flag| flag == name)
        }
        _ => false,
    }
}

#[cfg(target_arch = "aarch64")]
fn is_present(name: &str) -> bool {
    name == "neon" && std::arch::is_aarch64_feature_detected!("neon")
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn is_present(_: &str) -> bool {
    false
}

#[cfg(test)]
pub(in crate::kernels) mod tests {
    use super::*;
    use std::io::Write;
    use std::sync::Once;

    /// Sets between which some kernel differs: the levels, AVX2 with products of bytes, and AVX-512 with each extension
    /// alone.
    fn sets() -> Vec<CpuFeatures> {
        let one = |feature| CpuFeatures::of(&[feature]);
        let mut sets: Vec<_> = LEVELS.iter().map(|(_, set)| *set).collect();
        sets.push(AVX2.and(one(CpuFeature::AvxVnni)));
        sets.push(AVX512.and(one(CpuFeature::Avx512Vbmi)));
        sets.push(AVX512.and(one(CpuFeature::Avx512Bf16)));
        sets
    }

    /// The sets whose kernels tests compare. Says once which ones this CPU cannot run, past the test runner, which
    /// hides what tests print.
    pub fn runnable() -> Vec<CpuFeatures> {
        static SAID: Once = Once::new();
        let detected = CpuFeatures::detected();
        let (here, absent): (Vec<_>, Vec<_>) = sets().into_iter().partition(|set| detected.has(*set));
        SAID.call_once(|| {
            let said = format!("CPU kernels tested with {here:?}; not run, this CPU does not have them: {absent:?}\n");
            std::io::stderr().write_all(said.as_bytes()).expect("stderr");
        });
        here
    }

    /// Every subset of this CPU's features that kernels use.
    pub fn subsets() -> impl Iterator<Item = CpuFeatures> {
        let used = AVX512BF16.and(CpuFeatures::of(&[CpuFeature::AvxVnni])).0 & CpuFeatures::detected().0;
        (0..=used).filter(move |bits| bits & !used == 0).map(CpuFeatures)
    }

    #[test]
    fn the_variable_takes_levels_and_lists_of_features() {
        let detected = AVX512BF16;
        for (name, set) in LEVELS {
            assert_eq!(CpuFeatures::parse(name, detected), Ok(set));
        }
        assert_eq!(CpuFeatures::parse("best", detected), Ok(detected));
        assert_eq!(CpuFeatures::parse("avx2,fma", detected), Ok(AVX2));
        assert_eq!(CpuFeatures::parse("fma, avx2", detected), Ok(AVX2));
        // In a list `avx2` is the feature alone.
        assert_eq!(CpuFeatures::parse("avx2,avx512f", detected).unwrap().to_string(), "avx2 avx512f");
        let error = CpuFeatures::parse("sse9", detected).unwrap_err();
        assert!(error.starts_with("BBT_CPU_KERNELS=sse9: ") && error.contains("portable"), "{error}");
        let error = CpuFeatures::parse("avx2,fma,avx512f", AVX2).unwrap_err();
        assert!(error.contains("does not have avx512f; ") && error.contains("(avx2 fma)"), "{error}");
        assert!(CpuFeatures::parse("avx2,", detected).is_err() && CpuFeatures::parse("", detected).is_err());
    }

    #[test]
    fn each_feature_is_a_bit_of_its_own() {
        for (i, (feature, _)) in NAMES.iter().enumerate() {
            assert_eq!(*feature as usize, i);
        }
    }

    /// By what real CPUs have: [int8 products, rows, fp32 attention, bf16 attention, adamw8bit].
    #[test]
    #[cfg(target_arch = "x86_64")]
    fn each_operation_takes_the_best_kernel_that_the_cpu_runs() {
        use CpuFeature::*;
        let with = |set: CpuFeatures, more: &[CpuFeature]| set.and(CpuFeatures::of(more));
        for (cpu, features, expected) in [
            ("any", CpuFeatures(0), ["portable"; 5]),
            ("AVX2 without FMA", CpuFeatures::of(&[Avx2]), ["portable"; 5]),
            ("Haswell", AVX2, ["avx2"; 5]),
            ("Alder Lake", with(AVX2, &[AvxVnni]), ["avxvnni", "avx2", "avx2", "avx2", "avx2"]),
            ("Knights Landing", with(AVX2, &[Avx512F]), ["avx2"; 5]),
            ("Skylake-X", AVX512, ["avx512"; 5]),
            ("Cascade Lake", AVX512VNNI, ["avx512vnni", "avx512", "avx512", "avx512", "avx512"]),
            ("Ice Lake", AVX512VBMI, ["avx512vnni", "avx512", "avx512", "avx512", "avx512vbmi"]),
            (
                "Cooper Lake",
                with(AVX512VNNI, &[Avx512Bf16]),
                ["avx512vnni", "avx512", "avx512", "avx512bf16", "avx512"],
            ),
            (
                "Sapphire Rapids",
                with(AVX512BF16, &[Avx512Fp16, AvxVnni, AmxInt8, AmxBf16]),
                ["avx512vnni", "avx512", "avx512", "avx512bf16", "avx512vbmi"],
            ),
        ] {
            assert_eq!(features.kernels().map(|(_, kernel)| kernel), expected, "{cpu}");
        }
    }
}

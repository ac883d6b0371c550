// What each kernel is given, as one structure, and how many blocks and threads it wants: one text for the host, the
// device and the emulation of tests/cuda/.
//
// `n` rows of `d` values, contiguous where no stride is said. A `void*` points to values of the dtype, or dtypes, that
// the kernel's name ends with. Kernels that begin with "a block per row" take gridDim.x = n.
#pragma once

namespace bbt::cuda {

// Values that a thread reads and writes at once: 16 bytes of bf16.
constexpr int kPack = 8;
constexpr int kMaxThreads = 512;

// Of int8.
constexpr int kCodePack = 16;

// Threads for a row of `d` values: whole warps, one pack each where that is not too many.
constexpr int row_threads(long long d, int pack = kPack) {
  const long long threads = (d + 32 * pack - 1) / (32 * pack) * 32;
  return static_cast<int>(threads < 32 ? 32 : threads > kMaxThreads ? kMaxThreads : threads);
}

// A block per row.
struct Quantize {
  const void* x;       // [n, d]
  signed char* codes;  // [n, d]
  float* scales;       // [n]
  long long d;
};

// A block per row.
struct RmsNormQuantize {
  const void* x;        // [n, d]
  const float* weight;  // [d]
  signed char* codes;   // [n, d]
  float* scales;        // [n]
  float* rstd;          // [n]
  float eps;
  long long d;
};

// A block per `rows` rows, whose part of the weight's gradient it adds up.
struct RmsNormBackward {
  const void* dy;       // [n, d]
  const void* x;        // [n, d]
  const float* weight;  // [d]
  const float* rstd;    // [n]
  void* dx;             // [n, d], of x's dtype
  float* partial;       // [blocks, d]
  long long n, d, rows;
};

// Rows of which one block adds up the weight's gradient, by the shape alone: so the sum is the same on every device.
constexpr long long rms_norm_rows(long long n) {
  return n <= 8 * 512 ? 8 : (n + 511) / 512;
}

// A block of kSumThreads per 32 columns.
struct SumColumns {
  const float* partial;  // [n, d]
  float* sum;            // [d]
  long long n, d;
};
constexpr int kSumThreads = 256;

// A block per row.
struct SwiGluQuantize {
  const void* gate_up;  // [n, 2 d]
  signed char* codes;   // [n, d]
  float* scales;        // [n]
  long long d;
};

// A block per row.
struct SwiGluBackward {
  const void* dy;       // [n, d]
  const void* gate_up;  // [n, 2 d]
  void* dgate_up;       // [n, 2 d], of gate_up's dtype
  long long d;
};

// ternary_sum, then ternary_round, each of ternary_blocks(n) blocks of kMaxThreads.
struct Ternary {
  const float* w;      // [n]
  float* partial;      // [blocks]: each block's sum of |w|
  signed char* codes;  // [n]
  float* gamma;        // []
  long long n;
};
constexpr int ternary_blocks(long long n) {
  const long long blocks = (n + kMaxThreads * kPack - 1) / (kMaxThreads * kPack);
  return static_cast<int>(blocks < 1 ? 1 : blocks > 1024 ? 1024 : blocks);
}

// A block per row.
struct Rescale {
  const int* sums;      // [n, >= d], `stride` apart
  const float* scales;  // [n]
  const float* gamma;   // []
  void* y;              // [n, d]
  long long d, stride;
};

// A block per row.
struct ScaleRows {
  const void* x;        // [n, d]
  const float* scales;  // [n]
  void* y;              // [n, d]
  long long d;
};

// A block per token (b, t); `half` is D / 2. Strides in values.
struct Rope {
  const void* x;     // [B, T, heads, D]
  const float* cos;  // [T, half]
  const float* sin;  // [T, half]
  void* y;           // [B, T, heads, D], contiguous
  long long stride_b, stride_t, stride_h, length;
  int heads, half;
  float sign;  // of the sine
};

// A block per row.
struct CrossEntropy {
  const void* logits;        // [n, d]
  const long long* targets;  // [n]
  float* losses;             // [n]
  float* log_sums;           // [n]
  long long d;
};

// One block of kMaxThreads.
struct Sum {
  const float* values;  // [n]
  float* sum;           // []
  long long n;
};

// A block per row.
struct CrossEntropyBackward {
  const void* logits;        // [n, d]
  const long long* targets;  // [n]
  const float* log_sums;     // [n]
  const float* factor;       // []
  void* dlogits;             // [n, d]
  long long d;
};

// Neighbours that share one scale, and which a warp steps.
constexpr int kMomentBlock = 256;
constexpr int kAdamW8bitThreads = 256;

// A moment in 8 bits: values[code] * absmax. `nearest` are the codes of the values nearest to 65536 numbers from -1 to
// 1, evenly spaced.
struct Moment8bit {
  unsigned char* codes;          // [n]
  float* absmax;                 // [ceil(n / kMomentBlock)]
  const float* values;           // [256]
  const unsigned char* nearest;  // [65536]
};

// adamw8bit_blocks(n) blocks of kAdamW8bitThreads.
struct AdamW8bit {
  float* param;       // [n]
  const float* grad;  // [n]
  Moment8bit first, second;
  const float* step;       // []: with this one
  const float* found_inf;  // []: where it is 1, nothing is done
  long long n;
  // Of which the bias corrections are made.
  double lr, beta1, beta2;
  // beta, 1 - beta, 1 - lr * weight_decay: each rounded once.
  float decay1, decay2, rest1, rest2, keep, eps;
};
// Not more than run at once: each of them makes the bias corrections anew.
constexpr int adamw8bit_blocks(long long n) {
  constexpr int kPerBlock = kMomentBlock * (kAdamW8bitThreads / 32);
  const long long blocks = (n + kPerBlock - 1) / kPerBlock;
  return static_cast<int>(blocks > 1024 ? 1024 : blocks);
}

}  // namespace bbt::cuda

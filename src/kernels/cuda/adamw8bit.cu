// AdamW over moments of 8 bits, as kernels/cpu/adamw8bit_kernels.h has it: a block's moments are made fp32, stepped,
// used, and only then rounded to 8 bits again.
#include "device.h"

namespace bbt::cuda {

// The larger; what is not a number counts for nothing.
struct Larger {
  float operator()(float a, float b) const { return fmaxf(a, b); }
};

// What all blocks of a parameter have in common.
struct Common {
  float values1[256], values2[256];
  // lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t).
  float rate, scale;
};

// Values of a block of moments that a lane has.
constexpr int kPerLane = kMomentBlock / 32;

inline unsigned char nearest_code(const Moment8bit& moment, float x, float divisor) {
  const float place = (__fdiv_rn(x, divisor) + 1.0f) * 32767.5f + 0.5f;
  return moment.nearest[static_cast<int>(place) & 0xffff];
}

// A warp steps the block `block`, of which each lane reads and writes N values at once: packs of a whole one, or single
// ones, of which a rest may lack some.
template <int N>
void step_block(const AdamW8bit& a, const Common& common, long long block) {
  constexpr int kRounds = kPerLane / N;
  const int lane = threadIdx.x % 32;
  const auto place = [&](int round) { return block * kMomentBlock + (round * 32 + lane) * N; };
  const float kept1 = a.first.absmax[block] * a.decay1, kept2 = a.second.absmax[block] * a.decay2;
  // What lies beyond the end stays zero, and so never is the largest.
  float m[kRounds][N] = {}, v[kRounds][N] = {};
  float largest1 = 0, largest2 = 0;
  for (int round = 0; round < kRounds; ++round) {
    const long long i = place(round);
    if (N == 1 && i >= a.n) continue;
    float p[N], g[N];
    load(a.param + i, p);
    load(a.grad + i, g);
    const auto codes1 = *reinterpret_cast<const Pack<unsigned char, N>*>(a.first.codes + i);
    const auto codes2 = *reinterpret_cast<const Pack<unsigned char, N>*>(a.second.codes + i);
    for (int k = 0; k < N; ++k) {
      const float mean = common.values1[codes1.values[k]] * kept1 + g[k] * a.rest1;
      const float square = common.values2[codes2.values[k]] * kept2 + g[k] * g[k] * a.rest2;
      p[k] = p[k] * a.keep - common.rate * mean / (__fsqrt_rn(square) * common.scale + a.eps);
      m[round][k] = mean;
      v[round][k] = square;
      largest1 = fmaxf(largest1, fabsf(mean));
      largest2 = fmaxf(largest2, fabsf(square));
    }
    store(a.param + i, p);
  }
  largest1 = over_warp(largest1, Larger());
  largest2 = over_warp(largest2, Larger());
  if (lane == 0) {
    a.first.absmax[block] = largest1;
    a.second.absmax[block] = largest2;
  }
  // A block of zeros stays one.
  const float divisor1 = largest1 > 0 ? largest1 : 1, divisor2 = largest2 > 0 ? largest2 : 1;
  for (int round = 0; round < kRounds; ++round) {
    const long long i = place(round);
    if (N == 1 && i >= a.n) continue;
    Pack<unsigned char, N> codes1, codes2;
    for (int k = 0; k < N; ++k) {
      codes1.values[k] = nearest_code(a.first, m[round][k], divisor1);
      codes2.values[k] = nearest_code(a.second, v[round][k], divisor2);
    }
    *reinterpret_cast<Pack<unsigned char, N>*>(a.first.codes + i) = codes1;
    *reinterpret_cast<Pack<unsigned char, N>*>(a.second.codes + i) = codes2;
  }
}

inline void adamw8bit(const AdamW8bit& a) {
  __shared__ Common common;
  if (*a.found_inf == 1) return;
  if (threadIdx.x == 0) {
    // In fp64, as libtorch's fused AdamW has them: 1 - 0.999 in fp32 has four digits left. The host does not know the
    // step, which is not counted where one is skipped.
    const double t = *a.step;
    common.rate = static_cast<float>(a.lr / (1 - pow(a.beta1, t)));
    common.scale = static_cast<float>(1 / sqrt(1 - pow(a.beta2, t)));
  }
  for (unsigned i = threadIdx.x; i < 256; i += blockDim.x) {
    common.values1[i] = a.first.values[i];
    common.values2[i] = a.second.values[i];
  }
  __syncthreads();
  const bool packs = packed(kMomentBlock, a.param, a.grad, a.first.codes, a.second.codes);
  const unsigned warps = blockDim.x / 32, warp = threadIdx.x / 32;
  for (long long block = blockIdx.x * static_cast<long long>(warps) + warp; block * kMomentBlock < a.n;
       block += gridDim.x * static_cast<long long>(warps)) {
    if (packs && (block + 1) * kMomentBlock <= a.n) {
      step_block<kPerLane>(a, common, block);
    } else {
      step_block<1>(a, common, block);
    }
  }
}

}  // namespace bbt::cuda

BBT_KERNEL(adamw8bit, , AdamW8bit)

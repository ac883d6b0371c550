// Kernels that go over rows once: what the layers of a BitLinear network do between products. Included by one file per
// instruction set.
//
// A row is made fp32 in a scratch that stays in the first cache, padded to whole vectors: there every pass over it is
// cheap, and only reading and writing memory counts.
#pragma once

#include "rows.h"
#include "vector.h"

namespace {

using bbt::rows::Element;
using bbt::rows::Heads;
using bbt::rows::Matrix;
using bbt::rows::Quantized;

constexpr float kLog2E = 1.4426950408889634f;

// Below this the largest element of a row counts as zero.
constexpr float kSmallestScale = 1e-8f;

// Rows that a kernel holds in its scratch.
constexpr int64_t kScratchRows = 6;

BBT_INLINE int64_t padded(int64_t width) { return (width + kLanes - 1) / kLanes * kLanes; }

// --- reading and writing the caller's rows ---

template <class Dtype>
BBT_INLINE void read_as(const typename Dtype::Element* from, int64_t n, float pad, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, Dtype::load_row(from + i));
  if (i == n) return;
  typename Dtype::Element rest[kLanes] = {};
  __builtin_memcpy(rest, from + i, sizeof(typename Dtype::Element) * (n - i));
  store(to + i, iota() < static_cast<int32_t>(n - i) ? Dtype::load_row(rest) : broadcast(pad));
}

template <class Dtype>
BBT_INLINE void write_as(const float* from, int64_t n, typename Dtype::Element* to) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) Dtype::store_row(to + i, load(from + i));
  if (i == n) return;
  typename Dtype::Element rest[kLanes];
  Dtype::store_row(rest, load(from + i));
  __builtin_memcpy(to + i, rest, sizeof(typename Dtype::Element) * (n - i));
}

// `n` elements from the `at`-th on, followed by `pad` up to whole vectors.
void read(Element element, const void* data, int64_t at, int64_t n, float* to, float pad = 0) {
  switch (element) {
    case Element::kFloat:
      return read_as<Float>(static_cast<const float*>(data) + at, n, pad, to);
    case Element::kBFloat16:
      return read_as<BFloat16>(static_cast<const uint16_t*>(data) + at, n, pad, to);
    case Element::kHalf:
      return read_as<Half>(static_cast<const uint16_t*>(data) + at, n, pad, to);
    case Element::kInt8:
      return read_as<Int8>(static_cast<const int8_t*>(data) + at, n, pad, to);
  }
}

void write(const float* from, Element element, void* data, int64_t at, int64_t n) {
  switch (element) {
    case Element::kFloat:
      return write_as<Float>(from, n, static_cast<float*>(data) + at);
    case Element::kBFloat16:
      return write_as<BFloat16>(from, n, static_cast<uint16_t*>(data) + at);
    case Element::kHalf:
      return write_as<Half>(from, n, static_cast<uint16_t*>(data) + at);
    case Element::kInt8:
      return write_as<Int8>(from, n, static_cast<int8_t*>(data) + at);
  }
}

void read_row(const Matrix& x, int64_t row, float* to, float pad = 0) {
  read(x.element, x.data, row * x.width, x.width, to, pad);
}

void write_row(const float* from, const Matrix& x, int64_t row) {
  write(from, x.element, x.data, row * x.width, x.width);
}

// --- ternary weights ---

double sum_abs(const float* w, int64_t n) {
  typedef double DoubleVec __attribute__((vector_size(8 * BBT_LANES)));
  DoubleVec totals = {};
  double total = 0;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) totals += __builtin_convertvector(magnitude(load(w + i)), DoubleVec);
  for (; i < n; ++i) total += __builtin_fabsf(w[i]);
  for (int lane = 0; lane < kLanes; ++lane) total += totals[lane];
  return total;
}

void ternary(const float* w, int64_t n, float gamma, int8_t* codes) {
  const Vec one = broadcast(1);
  const auto code = [&](Vec x) {
    x = x / broadcast(gamma);
    // Not a number is neither below nor above.
    x = x < -one ? -one : x;
    x = x > one ? one : x;
    return x == x ? round_to_even(x) : Vec{};
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) Int8::store_row(codes + i, code(load(w + i)));
  if (i == n) return;
  float rest[kLanes] = {};
  int8_t rest_codes[kLanes];
  __builtin_memcpy(rest, w + i, sizeof(float) * (n - i));
  Int8::store_row(rest_codes, code(load(rest)));
  __builtin_memcpy(codes + i, rest_codes, n - i);
}

// --- activations ---

// Quantizes one row, which is overwritten.
BBT_INLINE void quantize_row(float* x, int64_t width, int64_t row, const Quantized& out) {
  // As integers the bits of magnitudes are ordered as they are, and what is not a number is above all.
  IntVec largest = {};
  for (int64_t i = 0; i < width; i += kLanes) {
    const IntVec bits = reinterpret_cast<IntVec>(magnitude(load(x + i)));
    largest = bits > largest ? bits : largest;
  }
  int32_t bits = 0;
  for (int lane = 0; lane < kLanes; ++lane) bits = largest[lane] > bits ? largest[lane] : bits;
  float absmax;
  __builtin_memcpy(&absmax, &bits, sizeof absmax);

  const float scale = (absmax < kSmallestScale ? kSmallestScale : absmax) / 127.0f;
  out.scales[row] = scale;
  int8_t* codes = out.codes + row * width;
  constexpr int32_t kInfinity = 0x7f800000;
  if (bits >= kInfinity) {
    // Zero times such a scale is not a number: the whole row becomes so, as it does in the reference.
    __builtin_memset(codes, 0, width);
    return;
  }
  const Vec largest_code = broadcast(127);
  for (int64_t i = 0; i < width; i += kLanes) {
    Vec code = round_to_even(load(x + i) / broadcast(scale));
    code = code > largest_code ? largest_code : code;
    store(x + i, code < -largest_code ? -largest_code : code);
  }
  write_as<Int8>(x, width, codes);
}

void quantize(const Matrix& x, int64_t begin, int64_t end, const Quantized& out, float* scratch) {
  for (int64_t row = begin; row < end; ++row) {
    read_row(x, row, scratch);
    quantize_row(scratch, x.width, row, out);
  }
}

void rms_norm_quantize(const Matrix& x, const float* weight, double eps, int64_t begin, int64_t end,
                       const Quantized& out, float* rstd, float* scratch) {
  const int64_t width = x.width;
  float *values = scratch, *weights = scratch + padded(width);
  read(Element::kFloat, weight, 0, width, weights);
  for (int64_t row = begin; row < end; ++row) {
    read_row(x, row, values);
    Vec squares = {};
    for (int64_t i = 0; i < width; i += kLanes) squares += load(values + i) * load(values + i);
    rstd[row] = 1 / __builtin_sqrtf(sum(squares) / static_cast<float>(width) + static_cast<float>(eps));
    for (int64_t i = 0; i < width; i += kLanes) store(values + i, load(values + i) * rstd[row] * load(weights + i));
    quantize_row(values, width, row, out);
  }
}

void rms_norm_backward(const Matrix& dy, const Matrix& x, const float* weight, const float* rstd, int64_t begin,
                       int64_t end, const Matrix& dx, float* dweight, float* scratch) {
  const int64_t width = x.width, step = padded(width);
  float *dys = scratch, *normed = dys + step, *weights = normed + step, *dweights = weights + step;
  read(Element::kFloat, weight, 0, width, weights);
  for (int64_t i = 0; i < width; i += kLanes) store(dweights + i, Vec{});
  for (int64_t row = begin; row < end; ++row) {
    read_row(dy, row, dys);
    read_row(x, row, normed);
    Vec products = {};
    for (int64_t i = 0; i < width; i += kLanes) {
      const Vec value = load(normed + i) * rstd[row], d = load(dys + i), dnormed = d * load(weights + i);
      store(dweights + i, load(dweights + i) + d * value);
      store(normed + i, value);
      store(dys + i, dnormed);
      products += dnormed * value;
    }
    const float mean = sum(products) / static_cast<float>(width);
    for (int64_t i = 0; i < width; i += kLanes) {
      store(dys + i, (load(dys + i) - load(normed + i) * mean) * rstd[row]);
    }
    write_row(dys, dx, row);
  }
  write(dweights, Element::kFloat, dweight, 0, width);
}

// 1 / (1 + exp(-x))
BBT_INLINE Vec sigmoid(Vec x) {
  const Vec power = exp2_of_negative(magnitude(x) * -kLog2E);
  return (x < 0.0f ? power : broadcast(1)) / (power + 1.0f);
}

void swiglu_quantize(const Matrix& gate_up, int64_t begin, int64_t end, const Quantized& out, float* scratch) {
  const int64_t width = gate_up.width / 2;
  float *gates = scratch, *ups = scratch + padded(width);
  for (int64_t row = begin; row < end; ++row) {
    read(gate_up.element, gate_up.data, 2 * row * width, width, gates);
    read(gate_up.element, gate_up.data, (2 * row + 1) * width, width, ups);
    for (int64_t i = 0; i < width; i += kLanes) {
      const Vec gate = load(gates + i);
      store(gates + i, gate * sigmoid(gate) * load(ups + i));
    }
    quantize_row(gates, width, row, out);
  }
}

void swiglu_backward(const Matrix& dy, const Matrix& gate_up, int64_t begin, int64_t end, const Matrix& dgate_up,
                     float* scratch) {
  const int64_t width = dy.width;
  float *gates = scratch, *ups = gates + padded(width), *dys = ups + padded(width);
  for (int64_t row = begin; row < end; ++row) {
    read(gate_up.element, gate_up.data, 2 * row * width, width, gates);
    read(gate_up.element, gate_up.data, (2 * row + 1) * width, width, ups);
    read_row(dy, row, dys);
    for (int64_t i = 0; i < width; i += kLanes) {
      const Vec gate = load(gates + i), d = load(dys + i), s = sigmoid(gate);
      store(gates + i, d * load(ups + i) * s * (1.0f + gate * (1.0f - s)));
      store(ups + i, d * gate * s);
    }
    write(gates, dgate_up.element, dgate_up.data, 2 * row * width, width);
    write(ups, dgate_up.element, dgate_up.data, (2 * row + 1) * width, width);
  }
}

void scale_rows(const Matrix& x, const float* scales, int64_t begin, int64_t end, const Matrix& out, float* scratch) {
  for (int64_t row = begin; row < end; ++row) {
    read_row(x, row, scratch);
    for (int64_t i = 0; i < x.width; i += kLanes) store(scratch + i, load(scratch + i) * scales[row]);
    write_row(scratch, out, row);
  }
}

// --- rotary positions ---

void rope(const Heads& x, int64_t length, int64_t heads, int64_t dim, const float* cos, const float* sin, float sign,
          int64_t begin, int64_t end, void* out, float* scratch) {
  const int64_t half = dim / 2, step = padded(half);
  float *a = scratch, *b = a + step, *cosines = b + step, *sines = cosines + step;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t time = row % length, at = row / length * x.batch + time * x.time;
    read(Element::kFloat, cos, time * half, half, cosines);
    read(Element::kFloat, sin, time * half, half, sines);
    for (int64_t i = 0; i < half; i += kLanes) store(sines + i, load(sines + i) * sign);
    for (int64_t head = 0; head < heads; ++head) {
      read(x.element, x.data, at + head * x.head, half, a);
      read(x.element, x.data, at + head * x.head + half, half, b);
      for (int64_t i = 0; i < half; i += kLanes) {
        const Vec first = load(a + i), second = load(b + i), c = load(cosines + i), s = load(sines + i);
        store(a + i, first * c - second * s);
        store(b + i, first * s + second * c);
      }
      const int64_t to = (row * heads + head) * dim;
      write(a, x.element, out, to, half);
      write(b, x.element, out, to + half, half);
    }
  }
}

// --- cross-entropy ---

void cross_entropy(const Matrix& logits, const int64_t* targets, int64_t begin, int64_t end, float* losses,
                   float* log_sums, float* scratch) {
  for (int64_t row = begin; row < end; ++row) {
    read_row(logits, row, scratch, -__builtin_inff());
    Vec larger_ones = load(scratch);
    for (int64_t i = kLanes; i < logits.width; i += kLanes) larger_ones = larger(load(scratch + i), larger_ones);
    float largest = larger_ones[0];
    for (int lane = 1; lane < kLanes; ++lane) largest = larger_ones[lane] > largest ? larger_ones[lane] : largest;
    Vec total = {};
    for (int64_t i = 0; i < logits.width; i += kLanes) {
      total += exp2_of_negative((load(scratch + i) - largest) * kLog2E);
    }
    const float log_total = __builtin_logf(sum(total));
    log_sums[row] = largest + log_total;
    // Not the difference of the two sums: the largest logit may be large.
    losses[row] = log_total + (largest - scratch[targets[row]]);
  }
}

void cross_entropy_backward(const Matrix& logits, const int64_t* targets, const float* log_sums, float factor,
                            int64_t begin, int64_t end, const Matrix& dlogits, float* scratch) {
  for (int64_t row = begin; row < end; ++row) {
    read_row(logits, row, scratch);
    const int64_t target = targets[row];
    for (int64_t i = 0; i < logits.width; i += kLanes) {
      store(scratch + i, exp2_of_negative((load(scratch + i) - log_sums[row]) * kLog2E));
    }
    scratch[target] -= 1;
    for (int64_t i = 0; i < logits.width; i += kLanes) store(scratch + i, load(scratch + i) * factor);
    write_row(scratch, dlogits, row);
  }
}

size_t scratch_floats(int64_t width) { return kScratchRows * padded(width); }

constexpr bbt::rows::Kernels kernels(const char* name) {
  return {
      .name = name,
      .needs = compiled_for(),
      .scratch_floats = scratch_floats,
      .sum_abs = sum_abs,
      .ternary = ternary,
      .quantize = quantize,
      .rms_norm_quantize = rms_norm_quantize,
      .rms_norm_backward = rms_norm_backward,
      .swiglu_quantize = swiglu_quantize,
      .swiglu_backward = swiglu_backward,
      .scale_rows = scale_rows,
      .rope = rope,
      .cross_entropy = cross_entropy,
      .cross_entropy_backward = cross_entropy_backward,
  };
}

}  // namespace

// Enough of CUDA to run kernels/cuda/ on a CPU: a block's threads are fibers of one thread, which goes from one to the
// next where they wait for each other.
//
// What that shows: what is computed, and that every thread of a block comes to the same barriers. Each warp in turn, in
// an order that is drawn anew, runs as far as barriers let it, so that a missing barrier shows. A misaligned pack shows
// where this is compiled with -fsanitize=alignment. What it cannot show: races within a warp, the memory model of the
// device, coalescing, occupancy, time.
#pragma once

#include <math.h>
#include <string.h>
#include <ucontext.h>

#include <c10/util/Half.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

struct Dim {
  unsigned x;
};

// Of the fiber that runs.
inline Dim threadIdx, blockIdx, blockDim, gridDim;

#define __global__
#define __shared__ static
#define __launch_bounds__(threads)

namespace emulation {

constexpr size_t kStack = 64 * 1024;

struct Barrier {
  unsigned size = 0, arrived = 0, turn = 0;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done = false;
};

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline const std::function<void()>* kernel;
inline Barrier block;
inline std::vector<Barrier> warps;
inline float slots[1024];
// Whether a fiber of the warp did anything since the scheduler last went through it.
inline bool moved;

inline void wait(Barrier& barrier) {
  const unsigned turn = barrier.turn;
  const Dim self = threadIdx;
  moved = true;
  if (++barrier.arrived == barrier.size) {
    barrier.arrived = 0;
    ++barrier.turn;
    return;
  }
  while (barrier.turn == turn) swapcontext(&fibers[self.x].context, &scheduler);
  moved = true;
}

inline void enter() {
  const Dim self = threadIdx;
  (*kernel)();
  fibers[self.x].done = true;
  moved = true;
  swapcontext(&fibers[self.x].context, &scheduler);
}

using Kernel = void (*)(const void* arguments);

// By name.
inline std::map<std::string, Kernel>& kernels() {
  static std::map<std::string, Kernel> all;
  return all;
}

// Runs `body` for every thread of every block.
inline void run(unsigned blocks, unsigned threads, const std::function<void()>& body) {
  static std::mt19937 random(1);
  gridDim = {blocks};
  blockDim = {threads};
  kernel = &body;
  if (fibers.size() < threads) fibers.resize(threads);
  for (unsigned b = 0; b < blocks; ++b) {
    blockIdx = {b};
    block = {threads};
    warps.assign(threads / 32, {32});
    std::vector<unsigned> order(threads / 32), lanes(32);
    std::iota(order.begin(), order.end(), 0);
    std::iota(lanes.begin(), lanes.end(), 0);
    for (unsigned t = 0; t < threads; ++t) {
      Fiber& fiber = fibers[t];
      fiber.done = false;
      if (fiber.stack == nullptr) fiber.stack.reset(new char[kStack]);
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStack;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, enter, 0);
    }
    // Warp by warp, each as far ahead of the others as barriers let it.
    while (!order.empty()) {
      std::shuffle(order.begin(), order.end(), random);
      bool any = false;
      for (const unsigned warp : order) {
        do {
          moved = false;
          std::shuffle(lanes.begin(), lanes.end(), random);
          for (const unsigned lane : lanes) {
            threadIdx = {warp * 32 + lane};
            Fiber& fiber = fibers[threadIdx.x];
            if (!fiber.done) swapcontext(&scheduler, &fiber.context);
          }
          any |= moved;
        } while (moved);
      }
      if (!any) {
        std::fprintf(stderr, "block %u: threads wait at a barrier that others do not come to\n", b);
        std::abort();
      }
      const auto done = [](unsigned warp) {
        return std::all_of(&fibers[warp * 32], &fibers[warp * 32] + 32, [](const Fiber& f) { return f.done; });
      };
      order.erase(std::remove_if(order.begin(), order.end(), done), order.end());
    }
  }
}

}  // namespace emulation

// In place of device.h's: a kernel to be found by its name.
#define BBT_KERNEL(name, ending, Arguments, ...)                                                       \
  static const bool registered_##name##ending =                                                        \
      emulation::kernels().emplace(#name #ending, [](const void* arguments) {                          \
        bbt::cuda::name __VA_ARGS__(*static_cast<const bbt::cuda::Arguments*>(arguments));             \
      }).second;

inline void __syncthreads() {
  emulation::wait(emulation::block);
}

inline float __shfl_xor_sync(unsigned, float value, int distance) {
  const unsigned self = threadIdx.x;
  emulation::slots[self] = value;
  emulation::wait(emulation::warps[self / 32]);
  const float other = emulation::slots[self ^ static_cast<unsigned>(distance)];
  emulation::wait(emulation::warps[self / 32]);
  return other;
}

inline float __fdiv_rn(float a, float b) {
  return a / b;
}

inline float __fsqrt_rn(float a) {
  return sqrtf(a);
}

inline float __uint_as_float(unsigned bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

inline unsigned __float_as_uint(float value) {
  unsigned bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float half_to_float(unsigned short bits) {
  return c10::Half(bits, c10::Half::from_bits());
}

inline unsigned short float_to_half(float value) {
  return c10::Half(value).x;
}

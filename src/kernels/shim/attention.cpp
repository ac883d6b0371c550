// Causal attention on the CPU as an autograd function. What is computed, and how, is in kernels/cpu/; here are
// tensors, threads and gradients.
#include "kernels.h"

#include "../cpu/attention.h"

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <c10/core/CPUAllocator.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <cmath>

namespace {

using bbt::attention::Kernels;
using bbt::attention::Problem;
using bbt::attention::View;

// Backward has a task per batch element and key/value head. Where those are fewer than kTasks, each is split, into at
// most kMaxSplits, for every one of which the gradient of the queries is held once in fp32.
constexpr int64_t kTasks = 24;
constexpr int64_t kMaxSplits = 8;

const Kernels& kernels(bbt::CpuFeatures features, at::ScalarType dtype) {
  return dtype == at::kFloat ? bbt::best(bbt::attention::kFloatKernels, features)
                             : bbt::best(bbt::attention::kBFloat16Kernels, features);
}

// The kernels read along D as it lies in memory.
at::Tensor readable(const at::Tensor& tensor) {
  return tensor.stride(3) == 1 ? tensor : tensor.contiguous();
}

// A new [B, H, T, D] that lies in memory as [B, T, H, D].
at::Tensor new_like(const at::Tensor& tensor) {
  return at::empty({tensor.size(0), tensor.size(2), tensor.size(1), tensor.size(3)}, tensor.options()).transpose(1, 2);
}

View view(const at::Tensor& tensor) {
  return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

Problem problem(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& out,
                const at::Tensor& lse) {
  Problem p = {};
  p.batch = q.size(0);
  p.heads = q.size(1);
  p.kv_heads = k.size(1);
  p.length = q.size(2);
  p.dim = q.size(3);
  p.scale = static_cast<float>(1 / std::sqrt(static_cast<double>(p.dim)));
  p.q = view(q);
  p.k = view(k);
  p.v = view(v);
  p.out = view(out);
  p.lse = lse.data_ptr<float>();
  return p;
}

// Runs `tasks` tasks on libtorch's threads, each of which has a scratch of its own.
template <typename Run>
void run(int64_t tasks, size_t scratch_bytes, const Run& run_range) {
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    const at::DataPtr scratch = c10::GetCPUAllocator()->allocate(scratch_bytes);
    run_range(begin, end, scratch.get());
  });
}

struct CausalAttention : torch::autograd::Function<CausalAttention> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& q_in, const at::Tensor& k_in,
                            const at::Tensor& v_in, bbt::CpuFeatures features) {
    const auto q = readable(q_in), k = readable(k_in), v = readable(v_in);
    const auto out = new_like(q);
    const auto lse = at::empty({q.size(0), q.size(1), q.size(2)}, q.options().dtype(at::kFloat));
    const Kernels& kernel = kernels(features, q.scalar_type());
    const Problem p = problem(q, k, v, out, lse);
    run(kernel.forward_tasks(p), kernel.forward_scratch(p),
        [&](int64_t begin, int64_t end, void* scratch) { kernel.forward(p, begin, end, scratch); });
    ctx->save_for_backward({q, k, v, out, lse});
    ctx->saved_data["features"] = static_cast<int64_t>(features.bits);
    return out;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    if (at::GradMode::is_enabled()) throw std::runtime_error("causal attention has no second derivative");
    const auto saved = ctx->get_saved_variables();
    const auto &q = saved[0], &k = saved[1], &v = saved[2];
    const auto dout = readable(grads[0]);
    const auto dq = new_like(q), dk = new_like(k), dv = new_like(v);
    const bbt::CpuFeatures features = {static_cast<uint32_t>(ctx->saved_data["features"].toInt())};
    const Kernels& kernel = kernels(features, q.scalar_type());
    Problem p = problem(q, k, v, saved[3], saved[4]);
    p.dout = view(dout);
    p.dq = view(dq);
    p.dk = view(dk);
    p.dv = view(dv);
    const int64_t tasks = std::max<int64_t>(p.batch * p.kv_heads, 1);
    p.splits = std::min((kTasks + tasks - 1) / tasks, kMaxSplits);
    at::Tensor partial;
    if (p.splits > 1) {
      partial = at::empty({p.splits, p.batch, p.heads, kernel.partial_size(p)}, q.options().dtype(at::kFloat));
      p.partial = partial.data_ptr<float>();
    }
    run(p.batch * p.kv_heads * p.splits, kernel.backward_scratch(p),
        [&](int64_t begin, int64_t end, void* scratch) { kernel.backward(p, begin, end, scratch); });
    if (p.splits > 1) {
      at::parallel_for(0, p.batch * p.heads, 1, [&](int64_t begin, int64_t end) { kernel.reduce(p, begin, end); });
    }
    return {dq, dk, dv, at::Tensor()};
  }
};

}  // namespace

extern "C" char* bbt_causal_attention(uint32_t features, const at::Tensor* q, const at::Tensor* k,
                                      const at::Tensor* v, at::Tensor** out) {
  return bbt::guarded([&] { *out = new at::Tensor(CausalAttention::apply(*q, *k, *v, bbt::CpuFeatures{features})); });
}

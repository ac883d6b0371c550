// CUDA graphs, as torch.cuda.graph records them (torch/cuda/graphs.py). libtorch's header wants CUDA's; where build.rs
// has not found them, this build says so when a graph is asked for.
#include "shim.h"

#include <stdexcept>

#ifdef BBT_NCCL

#include <ATen/cuda/CUDAGraph.h>
#include <c10/core/DeviceGuard.h>

#include <memory>

namespace {

struct Graph {
  explicit Graph(c10::DeviceIndex device)
      : before(c10::cuda::getCurrentCUDAStream(device)),
        stream(c10::cuda::getStreamFromPool(/*isHighPriority=*/false, device)) {}

  // Leaves the stream of the recording, whatever becomes of the rest.
  void end() {
    recording = false;
    const c10::DeviceGuard on(stream.device());
    c10::cuda::setCurrentCUDAStream(stream);
    try {
      graph.capture_end();
    } catch (...) {
      c10::cuda::setCurrentCUDAStream(before);
      throw;
    }
    c10::cuda::setCurrentCUDAStream(before);
  }

  c10::cuda::CUDAStream before;
  c10::cuda::CUDAStream stream;
  at::cuda::CUDAGraph graph;
  bool recording = false;
};

}  // namespace

extern "C" char* bbt_cuda_graph_begin(int device, void** graph) {
  return bbt::guarded([&] {
    auto made = std::make_unique<Graph>(static_cast<c10::DeviceIndex>(device));
    // What is under way would otherwise be waited for within the recording, which cannot.
    made->before.synchronize();
    // A graph has memory of its own, into which what the allocator keeps for others does not go.
    c10::cuda::CUDACachingAllocator::emptyCache();
    const c10::DeviceGuard on(made->stream.device());
    c10::cuda::setCurrentCUDAStream(made->stream);
    try {
      // Backward runs on a thread of autograd's, and the loader on another: what they ask of CUDA is not to end it.
      made->graph.capture_begin({0, 0}, cudaStreamCaptureModeThreadLocal);
    } catch (...) {
      c10::cuda::setCurrentCUDAStream(made->before);
      throw;
    }
    made->recording = true;
    *graph = made.release();
  });
}

extern "C" char* bbt_cuda_graph_end(void* graph) {
  return bbt::guarded([&] { static_cast<Graph*>(graph)->end(); });
}

extern "C" char* bbt_cuda_graph_replay(void* graph) {
  return bbt::guarded([&] { static_cast<Graph*>(graph)->graph.replay(); });
}

extern "C" void bbt_cuda_graph_free(void* graph) {
  auto* made = static_cast<Graph*>(graph);
  if (made->recording) {
    try {
      made->end();
    } catch (...) {
      // A recording that failed ends with an error, which has been told already.
    }
  }
  delete made;
}

#else

extern "C" char* bbt_cuda_graph_begin(int, void**) {
  return bbt::guarded([] {
    throw std::runtime_error("this build of bbt has no CUDA graphs: it was built against a libtorch without CUDA, or "
                             "without CUDA's headers (`make libtorch` installs them)");
  });
}

// Never called: there is no graph.
extern "C" char* bbt_cuda_graph_end(void*) { return nullptr; }
extern "C" char* bbt_cuda_graph_replay(void*) { return nullptr; }
extern "C" void bbt_cuda_graph_free(void*) {}

#endif

// c10d's Reducer, the engine of torch.nn.parallel.DistributedDataParallel: gradients are averaged bucket by bucket
// while backward still runs.
#include "c10d.h"
#include "shim.h"

#include <torch/csrc/distributed/c10d/logger.hpp>
#include <torch/csrc/distributed/c10d/reducer.hpp>

namespace {

struct Handle {
  std::shared_ptr<c10d::Reducer> reducer;
  // Measures, for bbt_reducer_times; the reducer holds it weakly.
  std::shared_ptr<c10d::Logger> logger;
};

Handle& handle_of(void* handle) { return *static_cast<Handle*>(handle); }

}  // namespace

extern "C" char* bbt_reducer_new(void* group, const at::Tensor* const* params, size_t n, int64_t bucket_bytes,
                                 void** reducer) {
  return bbt::guarded([&] {
    auto list = bbt::list(params, n);
    const std::vector<bool> sparse(n, false);
    // The first bucket is small, so that communication starts early. Gradients come roughly in the reverse
    // order of the parameters.
    auto buckets = std::get<0>(c10d::compute_bucket_assignment_by_size(
        list, {static_cast<size_t>(c10d::kDefaultFirstBucketBytes), static_cast<size_t>(bucket_bytes)}, sparse));
    std::reverse(buckets.begin(), buckets.end());
    auto handle = std::make_unique<Handle>();
    handle->reducer = std::make_shared<c10d::Reducer>(
        list, buckets, *static_cast<bbt::ProcessGroup*>(group), sparse, bucket_bytes,
        /*find_unused_parameters=*/false, /*gradient_as_bucket_view=*/true,
        std::unordered_map<size_t, std::string>(), c10d::kDefaultFirstBucketBytes,
        /*skip_all_reduce_unused_params=*/false, /*use_python_reducer=*/false, std::vector<int64_t>());
    handle->logger = std::make_shared<c10d::Logger>(handle->reducer);
    const auto device = list.at(0).device();
    std::vector<int> devices;
    if (device.is_cuda()) devices.push_back(device.index());
    handle->logger->set_construction_data_and_log("BitByteLM", devices, devices.empty() ? -1 : devices[0],
                                                  /*broadcast_buffers=*/false, /*has_sync_bn=*/false,
                                                  /*static_graph=*/false);
    handle->reducer->set_logger(handle->logger);
    *reducer = handle.release();
  });
}

// The destructors may throw; with the parameters going, too, there is nobody to tell.
extern "C" void bbt_reducer_free(void* reducer) {
  bbt_free_message(bbt::guarded([&] { delete static_cast<Handle*>(reducer); }));
}

extern "C" char* bbt_reducer_rebuild_buckets(void* reducer) {
  return bbt::guarded([&] { handle_of(reducer).reducer->rebuild_buckets(); });
}

extern "C" char* bbt_reducer_prepare_for_forward(void* reducer) {
  return bbt::guarded([&] {
    handle_of(reducer).logger->set_runtime_stats_and_log();
    handle_of(reducer).reducer->prepare_for_forward();
  });
}

// No output: with find_unused_parameters off there is no graph to search.
extern "C" char* bbt_reducer_prepare_for_backward(void* reducer) {
  return bbt::guarded([&] { handle_of(reducer).reducer->prepare_for_backward({}); });
}

extern "C" char* bbt_reducer_measure_every(void* reducer, int steps) {
  return bbt::guarded([&] { handle_of(reducer).reducer->set_ddp_runtime_logging_sample_rate(steps); });
}

// Nanoseconds, averages over the steps measured.
extern "C" char* bbt_reducer_times(void* reducer, int64_t* forward, int64_t* backward, int64_t* communication,
                                   int64_t* overlap) {
  return bbt::guarded([&] {
    auto data = handle_of(reducer).logger->get_ddp_logging_data();
    *forward = data.ints_map["avg_forward_compute_time"];
    *backward = data.ints_map["avg_backward_compute_time"];
    *communication = data.ints_map["avg_backward_comm_time"];
    *overlap = data.ints_map["avg_backward_compute_comm_overlap_time"];
  });
}

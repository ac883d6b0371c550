// Memory of a CUDA device, through the allocator interface that needs no CUDA headers.
#include "shim.h"

#include <c10/core/CachingDeviceAllocator.h>

extern "C" char* bbt_cuda_memory(int index, uint64_t* free_bytes, uint64_t* total_bytes,
                                 uint64_t* peak_bytes) {
  return bbt::guarded([&] {
    auto* allocator = c10::getDeviceAllocator(c10::DeviceType::CUDA);
    const auto device = static_cast<c10::DeviceIndex>(index);
    const auto memory = allocator->getMemoryInfo(device);
    *free_bytes = memory.first;
    *total_bytes = memory.second;
    *peak_bytes = 0;
    if (allocator->initialized()) {
      const auto all = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);
      *peak_bytes = static_cast<uint64_t>(allocator->getDeviceStats(device).allocated_bytes[all].peak);
    }
  });
}

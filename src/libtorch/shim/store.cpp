// c10d's TCPStore: the key-value store by which ranks find each other.
#include "c10d.h"
#include "shim.h"

#include <c10/util/Logging.h>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

namespace {

c10d::Store& store_of(void* handle) { return **static_cast<bbt::Store*>(handle); }

}  // namespace

extern "C" char* bbt_store_new(const char* host, uint16_t port, int is_server, int64_t timeout_ms,
                               const char* prefix, void** store, uint16_t* actual_port) {
  return bbt::guarded([&] {
    // Its warnings repeat, with stack traces, what comes back as an error.
    setenv("TORCH_CPP_LOG_LEVEL", "ERROR", /*overwrite=*/0);
    c10::initLogging();
    c10d::TCPStoreOptions options;
    options.port = port;
    options.isServer = is_server != 0;
    options.waitWorkers = false;
    options.timeout = std::chrono::milliseconds(timeout_ms);
    auto tcp = c10::make_intrusive<c10d::TCPStore>(host, options);
    *actual_port = tcp->getPort();
    bbt::Store inner = std::move(tcp);
    if (prefix[0] != '\0') inner = c10::make_intrusive<c10d::PrefixStore>(prefix, inner);
    *store = new bbt::Store(std::move(inner));
  });
}

extern "C" void bbt_store_free(void* store) { delete static_cast<bbt::Store*>(store); }

extern "C" char* bbt_store_set(void* store, const char* key, const uint8_t* value, size_t n) {
  return bbt::guarded([&] { store_of(store).set(key, std::vector<uint8_t>(value, value + n)); });
}

extern "C" char* bbt_store_get(void* store, const char* key, int64_t timeout_ms, uint8_t** value, size_t* n) {
  return bbt::guarded([&] {
    store_of(store).wait({key}, std::chrono::milliseconds(timeout_ms));
    auto found = store_of(store).get(key);
    *n = found.size();
    *value = static_cast<uint8_t*>(malloc(found.size() + 1));
    if (*value == nullptr) throw std::bad_alloc();
    memcpy(*value, found.data(), found.size());
  });
}

extern "C" char* bbt_store_add(void* store, const char* key, int64_t amount, int64_t* sum) {
  return bbt::guarded([&] { *sum = store_of(store).add(key, amount); });
}

extern "C" char* bbt_store_check(void* store, const char* key, int* present) {
  return bbt::guarded([&] { *present = store_of(store).check({key}) ? 1 : 0; });
}

#include "memory.h"

#include <dlfcn.h>
#include <pthread.h>
#include <sys/mman.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/stableivalue_conversions.h>
#include <unistd.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <numeric>

namespace widenet {
namespace {

constexpr int64_t kLargePage = 2 << 20;  // bytes; smaller tensors are malloc's alone
constexpr int64_t kLongestRest = 1024;   // large tensors that are made until what none of them took is given back

int64_t size_of(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return 8;
    case ScalarType::Float:
    case ScalarType::Int:
      return 4;
    case ScalarType::BFloat16:
    case ScalarType::Half:
      return 2;
    default:
      STD_TORCH_CHECK(false, "widenet_kernels: there is no memory for tensors of this dtype");
      return 0;
  }
}

int32_t code_of(ScalarType type) { return torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)); }

// Straight from the C shim, without a turn of the dispatcher.
Tensor from_torch(const Sizes& sizes, const Sizes& strides, int32_t type, int32_t device_type, int32_t device) {
  AtenTensorHandle made = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                         strides.data(), type, device_type, device, &made));
  return Tensor(made);
}

// Pages of 2 MiB where the system gives them when asked: to page memory in by 4 KiB costs as much as a pass over it.
// Asked for from the page on in which the tensor begins: malloc's own words stand before it, in what may be the first
// large page.
void ask_for_large_pages(const Tensor& t, int64_t bytes) {
  static const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto first = reinterpret_cast<uintptr_t>(t.mutable_data_ptr()), begin = first / page * page;
  madvise(reinterpret_cast<void*>(begin), first + bytes - begin, MADV_HUGEPAGE);
}

// Memory of torch's, so that its profiler sees it.
struct Block {
  explicit Block(int64_t size)
      : size(size), tensor(from_torch({size}, {1}, aoti_torch_dtype_uint8(), aoti_torch_device_type_cpu(), 0)) {
    ask_for_large_pages(tensor, size);
  }
  int64_t size;
  Tensor tensor;
  int64_t returned = 0;  // when: how many blocks had been taken
};

using Blocks = std::vector<std::unique_ptr<Block>>;

// Blocks that no tensor uses. They and those in use are together never more than was in use at once. What is made and
// what is freed, is without the lock.
class Pool {
 public:
  std::unique_ptr<Block> take(int64_t bytes) {
    std::unique_ptr<Block> block = take_kept(bytes);
    if (block) return block;
    try {
      block = make(bytes);
    } catch (...) {
      const std::lock_guard lock(mutex_);
      in_use_ -= bytes;
      most_in_use_ = in_use_;
      throw;
    }
    const std::lock_guard lock(mutex_);
    most_in_use_ = std::max(most_in_use_, in_use_);
    return block;
  }

  void give_back(std::unique_ptr<Block> block) {
    const std::lock_guard lock(mutex_);
    in_use_ -= block->size;
    block->returned = taken_;
    kept_.push_back(std::move(block));
  }

  int64_t empty() {
    Blocks freed;
    const std::lock_guard lock(mutex_);
    std::swap(kept_, freed);
    most_in_use_ = in_use_;
    return std::accumulate(freed.begin(), freed.end(), int64_t{0}, add_size);
  }

  std::mutex& mutex() { return mutex_; }

 private:
  // Where there is no memory, what rests here may be what is missing.
  std::unique_ptr<Block> make(int64_t bytes) {
    try {
      return std::make_unique<Block>(bytes);
    } catch (...) {
      if (empty() == 0) throw;
      return std::make_unique<Block>(bytes);
    }
  }

  // The block, or null where none fits: then there is room for it.
  std::unique_ptr<Block> take_kept(int64_t bytes) {
    Blocks freed;
    const std::lock_guard lock(mutex_);
    std::unique_ptr<Block> found = find(bytes);
    in_use_ += found ? found->size : bytes;
    const int64_t most = std::max(most_in_use_, in_use_);  // if it can be made
    ++taken_;
    while (!kept_.empty() && (in_use_ + size() > most || taken_ - kept_.front()->returned > kLongestRest)) {
      freed.push_back(std::move(kept_.front()));  // the one that has rested longest
      kept_.erase(kept_.begin());
    }
    return found;
  }

  // The smallest that is large enough, unless it is much too large.
  std::unique_ptr<Block> find(int64_t bytes) {
    auto best = kept_.end();
    for (auto block = kept_.begin(); block != kept_.end(); ++block) {
      const bool fits = (*block)->size >= bytes && (*block)->size - bytes <= bytes / 4;
      if (fits && (best == kept_.end() || (*block)->size < (*best)->size)) best = block;
    }
    if (best == kept_.end()) return nullptr;
    std::unique_ptr<Block> found = std::move(*best);
    kept_.erase(best);
    return found;
  }

  static int64_t add_size(int64_t sum, const std::unique_ptr<Block>& block) { return sum + block->size; }
  int64_t size() const { return std::accumulate(kept_.begin(), kept_.end(), int64_t{0}, add_size); }

  std::mutex mutex_;
  Blocks kept_;  // in the order in which they came back
  int64_t in_use_ = 0, most_in_use_ = 0, taken_ = 0;
};

Pool& pool();
void lock_pool() { pool().mutex().lock(); }
void unlock_pool() { pool().mutex().unlock(); }

// Never destroyed: tensors may outlive what is static. While a process forks no thread holds the lock.
Pool& pool() {
  static Pool* const made = [] {
    pthread_atfork(lock_pool, unlock_pool, unlock_pool);
    return new Pool;
  }();
  return *made;
}

// Makes a tensor of memory that a function takes back: what torch has from 2.11.0 on (its nightlies had another form).
using FromBlob = AOTITorchError (*)(void*, int64_t, const int64_t*, const int64_t*, int64_t, int32_t, int32_t, int32_t,
                                    AtenTensorHandle*, int32_t, const uint8_t*, int64_t, void (*)(void*, void*), void*);

void return_block(void*, void* block) { pool().give_back(std::unique_ptr<Block>(static_cast<Block*>(block))); }

}  // namespace

Tensor new_tensor(const Sizes& sizes, const Sizes& strides, ScalarType type, int32_t device_type, int32_t device) {
  static const auto from_blob = reinterpret_cast<FromBlob>(dlsym(RTLD_DEFAULT, "torch_from_blob"));
  const int64_t bytes = std::accumulate(sizes.begin(), sizes.end(), size_of(type), std::multiplies());
  const bool large = device_type == aoti_torch_device_type_cpu() && bytes >= kLargePage;
  if (!large || !from_blob) {
    const Tensor t = from_torch(sizes, strides, code_of(type), device_type, device);
    if (large) ask_for_large_pages(t, bytes);
    return t;
  }
  Block* const block = pool().take(bytes).release();  // lost if what follows fails: torch may have it or not
  AtenTensorHandle made = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(from_blob(block->tensor.mutable_data_ptr(), static_cast<int64_t>(sizes.size()),
                                          sizes.data(), strides.data(), 0, code_of(type), device_type, -1, &made,
                                          aoti_torch_layout_strided(), nullptr, 0, return_block, block));
  return Tensor(made);
}

int64_t empty_cache() { return pool().empty(); }

}  // namespace widenet

// For Python to call, by ctypes.
extern "C" __attribute__((visibility("default"))) int64_t widenet_empty_cache() { return widenet::empty_cache(); }

// CUDA's kernels on a CPU: what csrc/cuda uses of the language, for g++ and its sanitizers.
//
// One fibre per CUDA thread, the threads of a block in turn, block after block. A fibre runs until it waits for
// others: at a barrier for its block, at a warp operation for the lanes of its mask. What some of them never reach is
// an error that names the block and the threads. The order of threads between two waits, and of blocks, follows a
// seed, so that a missing barrier shows as results that change; shared memory starts as garbage of that seed, and its
// ends are known to AddressSanitizer.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <source_location>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define WIDENET_START_SWITCH(...) __sanitizer_start_switch_fiber(__VA_ARGS__)
#define WIDENET_FINISH_SWITCH(...) __sanitizer_finish_switch_fiber(__VA_ARGS__)
#else
#define WIDENET_START_SWITCH(...)
#define WIDENET_FINISH_SWITCH(...)
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
using cudaStream_t = struct CUstream_st*;

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

using Site = std::source_location;
constexpr int kLanes = 32;
constexpr size_t kStackBytes = 128 << 10;

inline uint64_t seed = 0;  // 0: threads and blocks in order

// What a fibre waits for: "__syncthreads" of its block, or an operation of the lanes in a mask.
struct Wait {
  const char* operation = nullptr;  // null: it can run
  unsigned mask = 0;                // 0: the whole block
  uint64_t value = 0;
  Site site{};

  bool same(const Wait& other) const {
    return operation && other.operation && !std::strcmp(operation, other.operation) && mask == other.mask &&
           site.line() == other.site.line() && !std::strcmp(site.file_name(), other.site.file_name());
  }
};

struct Fibre {
  ucontext_t context;
  void* fake_stack = nullptr;  // AddressSanitizer's
  Wait wait;
  std::array<uint64_t, kLanes> values;  // of the lanes that met, by lane
  bool done = false;
};

// A thread's stack, which launch after launch uses again.
inline char* stack_of(size_t thread) {
  static std::vector<std::unique_ptr<char[]>> stacks;
  while (stacks.size() <= thread) stacks.emplace_back(new char[kStackBytes]);
  return stacks[thread].get();
}

class Block {
 public:
  Block(const char* name, unsigned threads) : name_(name), fibres_(threads), order_(threads) {
    std::iota(order_.begin(), order_.end(), 0u);
  }

  static Block*& current() {
    static Block* block = nullptr;
    return block;
  }

  // One block from beginning to end.
  void run(const std::function<void()>& kernel, std::mt19937_64& random) {
    kernel_ = &kernel;
    for (unsigned thread : order_) start(fibres_[thread], stack_of(thread));
    for (size_t running = fibres_.size(); running;) {
      if (seed) std::shuffle(order_.begin(), order_.end(), random);
      for (unsigned thread : order_) {
        if (fibres_[thread].done || fibres_[thread].wait.operation) continue;
        enter(thread);
        running -= fibres_[thread].done;
      }
      if (running && !release()) throw std::runtime_error(stuck());
    }
  }

  // Called by the running fibre: comes back once all that are asked for have called the same.
  const std::array<uint64_t, kLanes>& meet(const Wait& wait) {
    Fibre& fibre = fibres_[running_];
    if (wait.mask && !(wait.mask >> (running_ % kLanes) & 1)) {
      fail(std::string(wait.operation) + " with a mask that leaves out the calling lane", wait.site);
    }
    fibre.wait = wait;
    leave(fibre);
    if (error_.size()) throw std::runtime_error(error_);
    return fibre.values;
  }

  [[noreturn]] void fail(const std::string& what, const Site& site) const {
    throw std::runtime_error(where() + " thread " + std::to_string(running_) + ": " + what + at(site));
  }

 private:
  static std::string at(const Site& site) {
    return " at " + std::string(site.file_name()) + ":" + std::to_string(site.line());
  }

  std::string where() const {
    return std::string(name_) + ", block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ")";
  }

  void start(Fibre& fibre, char* stack) {
    fibre.done = false;
    fibre.wait = {};
    fibre.fake_stack = nullptr;
    getcontext(&fibre.context);
    fibre.context.uc_stack = {.ss_sp = stack, .ss_flags = 0, .ss_size = kStackBytes};
    fibre.context.uc_link = nullptr;
    makecontext(&fibre.context, &Block::body, 0);
  }

  static void body() {
    Block& block = *current();
    WIDENET_FINISH_SWITCH(nullptr, &block.host_bottom_, &block.host_size_);
    try {
      (*block.kernel_)();
    } catch (const std::exception& error) {
      block.error_ = error.what();
    }
    Fibre& fibre = block.fibres_[block.running_];
    fibre.done = true;
    WIDENET_START_SWITCH(nullptr, block.host_bottom_, block.host_size_);
    setcontext(&block.host_);
  }

  void enter(unsigned thread) {
    Fibre& fibre = fibres_[thread];
    running_ = thread;
    threadIdx = {thread % blockDim.x, thread / blockDim.x % blockDim.y, thread / blockDim.x / blockDim.y};
    WIDENET_START_SWITCH(&host_fake_stack_, fibre.context.uc_stack.ss_sp, kStackBytes);
    swapcontext(&host_, &fibre.context);
    WIDENET_FINISH_SWITCH(host_fake_stack_, nullptr, nullptr);
    if (error_.size()) throw std::runtime_error(error_);
  }

  void leave(Fibre& fibre) {
    WIDENET_START_SWITCH(&fibre.fake_stack, host_bottom_, host_size_);
    swapcontext(&fibre.context, &host_);
    WIDENET_FINISH_SWITCH(fibre.fake_stack, &host_bottom_, &host_size_);
  }

  // Lets those go on who have met; false if nobody has.
  bool release() {
    bool any = false;
    for (size_t first = 0; first < fibres_.size(); first += kLanes) {
      for (size_t thread = first; thread < std::min(first + kLanes, fibres_.size()); ++thread) {
        if (fibres_[thread].wait.mask) any |= release_lanes(first, fibres_[thread].wait);
      }
    }
    const bool all = std::all_of(fibres_.begin(), fibres_.end(), [this](const Fibre& fibre) {
      return !fibre.done && !fibre.wait.mask && fibre.wait.same(fibres_[0].wait);
    });
    if (all) {
      for (Fibre& fibre : fibres_) fibre.wait = {};
    }
    return any || all;
  }

  bool release_lanes(size_t first, const Wait wait) {
    std::array<uint64_t, kLanes> values{};
    for (size_t lane = 0; lane < kLanes; ++lane) {
      if (!(wait.mask >> lane & 1)) continue;
      if (first + lane >= fibres_.size() || !fibres_[first + lane].wait.same(wait)) return false;
      values[lane] = fibres_[first + lane].wait.value;
    }
    for (size_t lane = 0; lane < kLanes; ++lane) {
      if (!(wait.mask >> lane & 1)) continue;
      fibres_[first + lane].values = values;
      fibres_[first + lane].wait = {};
    }
    return true;
  }

  // Who waits for whom when nobody can go on.
  std::string stuck() const {
    const auto waiting = std::find_if(fibres_.begin(), fibres_.end(), [](const Fibre& f) { return f.wait.operation; });
    const size_t thread = waiting - fibres_.begin(), first = thread / kLanes * kLanes;
    const Wait& wait = waiting->wait;
    std::string missing;
    for (size_t other = 0; other < fibres_.size(); ++other) {
      const bool asked = !wait.mask || (other - first < kLanes && wait.mask >> (other - first) & 1);
      if (!asked || fibres_[other].wait.same(wait)) continue;
      missing += (missing.empty() ? "" : ", ") + std::to_string(other) + describe(fibres_[other]);
    }
    if (missing.empty()) missing = "lanes past the end of the block";
    return where() + ": thread " + std::to_string(thread) + " waits in " + wait.operation + at(wait.site) +
           ", which was never reached by " + missing;
  }

  static std::string describe(const Fibre& fibre) {
    return fibre.done ? " (ended)" : " (in " + std::string(fibre.wait.operation) + at(fibre.wait.site) + ")";
  }

  const char* name_;
  std::vector<Fibre> fibres_;
  std::vector<unsigned> order_;
  const std::function<void()>* kernel_ = nullptr;
  unsigned running_ = 0;
  std::string error_;
  ucontext_t host_;
  void* host_fake_stack_ = nullptr;
  const void* host_bottom_ = nullptr;
  size_t host_size_ = 0;
};

inline std::unique_ptr<char[]> shared;  // the running block's, as large as the launch asked for

inline void fill_with_garbage(char* bytes, size_t size, uint64_t block) {
  std::mt19937 random(static_cast<unsigned>(seed * 7919 + block + 1));
  std::generate(bytes, bytes + size, [&] { return static_cast<char>(random() | 1); });
}

// The values of the lanes in the mask, once all of them are here.
inline const std::array<uint64_t, kLanes>& meet(const char* operation, unsigned mask, uint64_t value, Site site) {
  return Block::current()->meet({operation, mask, value, site});
}

inline unsigned lane() { return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % kLanes; }

template <class T>
uint64_t bits_of(T value) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

// The value of another lane, which must be in the mask; its own where the segment of ``width`` lanes ends before it.
template <class T>
T exchange(const char* operation, unsigned mask, T value, unsigned source, bool inside, Site site) {
  const unsigned self = lane(), from = inside ? source : self;
  const auto& values = meet(operation, mask, bits_of(value), site);
  if (!(mask >> from & 1))
    Block::current()->fail(std::string(operation) + " reads a lane that is not in its mask", site);
  T result;
  std::memcpy(&result, &values[from], sizeof(T));
  return result;
}

template <class... Params, class... Args>
void launch(const char* name, void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, Args... args) {
  gridDim = grid;
  blockDim = block;
  std::mt19937_64 random(seed);
  std::vector<uint64_t> blocks(static_cast<uint64_t>(grid.x) * grid.y * grid.z);
  std::iota(blocks.begin(), blocks.end(), uint64_t{0});
  if (seed) std::shuffle(blocks.begin(), blocks.end(), random);
  Block running(name, block.x * block.y * block.z);
  Block::current() = &running;
  shared.reset(new char[shared_bytes]);
  const std::function<void()> body = [&] { kernel(static_cast<Params>(args)...); };
  for (uint64_t number : blocks) {
    blockIdx = {static_cast<unsigned>(number % grid.x), static_cast<unsigned>(number / grid.x % grid.y),
                static_cast<unsigned>(number / grid.x / grid.y)};
    fill_with_garbage(shared.get(), shared_bytes, number);
    running.run(body, random);
  }
}

}  // namespace emulator

// ------------------------------------------------------------------------------------------------------- the language

#define WIDENET_SITE emulator::Site site = emulator::Site::current()

inline void __syncthreads(WIDENET_SITE) { emulator::meet("__syncthreads", 0, 0, site); }
inline void __syncwarp(unsigned mask = ~0u, WIDENET_SITE) { emulator::meet("__syncwarp", mask, 0, site); }

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, WIDENET_SITE) {
  const unsigned first = emulator::lane() / width * width;
  return emulator::exchange("__shfl_sync", mask, value, first + source % width, true, site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance, int width = 32, WIDENET_SITE) {
  const unsigned source = emulator::lane() ^ distance;
  const bool inside = source / width <= emulator::lane() / width;
  return emulator::exchange("__shfl_xor_sync", mask, value, source, inside, site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32, WIDENET_SITE) {
  const bool inside = emulator::lane() % width >= distance;
  return emulator::exchange("__shfl_up_sync", mask, value, emulator::lane() - distance, inside, site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32, WIDENET_SITE) {
  const bool inside = emulator::lane() % width + distance < static_cast<unsigned>(width);
  return emulator::exchange("__shfl_down_sync", mask, value, emulator::lane() + distance, inside, site);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, WIDENET_SITE) {
  const auto& values = emulator::meet("__ballot_sync", mask, predicate != 0, site);
  unsigned votes = 0;
  for (int lane = 0; lane < emulator::kLanes; ++lane) votes |= static_cast<unsigned>(values[lane]) << lane;
  return votes;
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value, WIDENET_SITE) {
  const auto& values = emulator::meet("__match_any_sync", mask, emulator::bits_of(value), site);
  unsigned equal = 0;
  for (int lane = 0; lane < emulator::kLanes; ++lane) {
    if (mask >> lane & 1 && values[lane] == emulator::bits_of(value)) equal |= 1u << lane;
  }
  return equal;
}

struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return {static_cast<uint16_t>(x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
struct __half {
  _Float16 value;
};
inline float __half2float(__half x) { return x.value; }
inline __half __float2half_rn(float x) { return {static_cast<_Float16>(x)}; }

inline int __popc(unsigned bits) { return std::popcount(bits); }
inline int __ffs(int bits) { return bits ? std::countr_zero(static_cast<unsigned>(bits)) + 1 : 0; }
template <class T>
T atomicAdd(T* address, T value) {  // integers alone: those add up to the same in every order
  static_assert(std::is_integral_v<T>);
  const T before = *address;
  *address = before + value;
  return before;
}
template <class T>
T* shared_memory() {
  return reinterpret_cast<T*>(emulator::shared.get());
}

#undef WIDENET_SITE

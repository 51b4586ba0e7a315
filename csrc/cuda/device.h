// What the kernels share: the language (CUDA, or the emulator under g++), launches, number formats, wide accesses.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#else
#include "../testing/cuda_emulator.h"
#endif

#include "../cpu/kernels.h"

namespace widenet::cuda {

#ifdef __CUDACC__
// The block's shared memory, as large as its launch asked for.
template <class T>
__device__ T* shared_memory() {
  extern __shared__ __align__(16) char shared[];
  return reinterpret_cast<T*>(shared);
}
#endif

constexpr unsigned kThreads = 256, kLanes = 32, kWarps = kThreads / kLanes, kAllLanes = ~0u;

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Starts a kernel of kThreads threads a block on the stream; ``name`` is the op's, for the error.
template <class... Params, class... Args>
void launch(const char* name, void (*kernel)(Params...), int64_t blocks, size_t shared_bytes, cudaStream_t stream,
            Args... args) {
  if (!blocks) return;
#ifdef __CUDACC__
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
  if (error != cudaSuccess) {
    cudaGetLastError();  // else the next launch would report it again
    throw std::runtime_error(std::string(name) + ": the launch failed: " + cudaGetErrorString(error));
  }
#else
  static_cast<void>(stream);
  emulator::launch(name, kernel, {static_cast<unsigned>(blocks)}, {kThreads}, shared_bytes, args...);
#endif
}

// f(tag): the storage type of a DType, as the type of its argument.
template <class F>
void dispatch(DType type, F&& f) {
  switch (type) {
    case DType::f32:
      return f(float{});
    case DType::bf16:
      return f(__nv_bfloat16{});
    case DType::f16:
      return f(__half{});
    case DType::f64:
      return f(double{});
  }
}

template <class T>
using math_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }

// To nearest; from double by way of float.
template <class T, class A>
__device__ T narrow(A x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(static_cast<float>(x));
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(static_cast<float>(x));
  } else {
    return static_cast<T>(x);
  }
}

// Choices are counted in 31 bits; a division of 64 would take longer than the row.
__device__ inline int64_t token_of(int64_t choice, int64_t k) {
  return static_cast<uint32_t>(choice) / static_cast<uint32_t>(k);
}

// N neighbours that are loaded or stored at once.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T values[N];
};

constexpr int kWideBytes = 16;

// Whether all of these, pointers and distances in bytes, are at multiples of kBytes.
template <int kBytes, class... Places>
bool is_aligned(Places... places) {
  return (((uintptr_t)places % kBytes == 0) && ...);
}

// Sums over groups of kWidth neighbouring lanes; every lane gets it, in the same order.
template <int kWidth, class A>
__device__ A group_sum(A value) {
#pragma unroll
  for (int distance = kWidth / 2; distance; distance /= 2) value += __shfl_xor_sync(kAllLanes, value, distance);
  return value;
}

}  // namespace widenet::cuda

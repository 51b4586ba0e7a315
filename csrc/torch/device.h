// Where a stage runs: on the CPU's threads, or on the current stream of the GPU that holds its tensors.
#pragma once

#include "../cpu/parallel.h"
#include "../cuda/kernels.h"
#include "tensor.h"

namespace widenet {

bool on_gpu(const Tensor& t);

// f(stream): PyTorch's current stream of the tensor's GPU, with that GPU as the current device.
void on_stream(const Tensor& t, const std::function<void(cudaStream_t)>& f);

template <class Args>
using CpuKernel = void (*)(const Args&, int64_t begin, int64_t end);
template <class Args>
using CudaKernel = void (*)(const Args&, int64_t size, cudaStream_t);

// The kernel over [0, size), on the device of ``t``; ``grain``: a CPU thread's least share.
template <class Args>
void run(const Tensor& t, CpuKernel<Args> cpu, CudaKernel<Args> cuda, const Args& args, int64_t size, int64_t grain) {
  if (on_gpu(t)) {
    on_stream(t, [&](cudaStream_t stream) { cuda(args, size, stream); });
  } else {
    parallel_for(size, grain, [&](int64_t begin, int64_t end) { cpu(args, begin, end); });
  }
}

bool built_with_cuda();

// Registers a stage's ops, the same functions for every device whose kernels were built.
#define WIDENET_OPS(m)                                                    \
  static void register_ops(torch::stable::detail::StableLibrary& m);      \
  STABLE_TORCH_LIBRARY_IMPL(widenet_kernels, CPU, m) { register_ops(m); } \
  STABLE_TORCH_LIBRARY_IMPL(widenet_kernels, CUDA, m) {                   \
    if (built_with_cuda()) register_ops(m);                               \
  }                                                                       \
  static void register_ops(torch::stable::detail::StableLibrary& m)

}  // namespace widenet

// New tensors. The memory of large ones on a CPU is kept for the next of about the same size.
//
// glibc takes what is larger than 32 MiB anew from the system for every tensor and gives the top of its heap back after
// a call, so that every call pages in its gradients and hidden rows again. For few tokens that takes longer than the
// products; on a virtual machine whose host takes free pages back, many times as long.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

namespace widenet {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

// Uninitialised and dense: `strides` are the sizes' in some order.
Tensor new_tensor(const Sizes& sizes, const Sizes& strides, ScalarType type, int32_t device_type, int32_t device);

// Gives back what is kept and not in use, and says how many bytes that was.
int64_t empty_cache();

}  // namespace widenet

// The CUDA kernels: the arguments are those of ../cpu/kernels.h, pointers on the device. Nothing waits for the GPU.
//
// What cannot be launched throws std::runtime_error or std::invalid_argument, which names the op. The functions are
// weak: a build without CUDA has null in their place, and registers no op for a GPU.
#pragma once

#include "../cpu/kernels.h"
#include "../cpu/plan.h"

using cudaStream_t = struct CUstream_st*;  // as CUDA's headers have it

namespace widenet::cuda {

constexpr int64_t kMostExperts = 1024;  // of gate and plan
constexpr int64_t kFewExperts = 16;     // of route_backward

// Over tokens. rows[t] = x[t], but zero if all of grad[t] is: what a token holds that asked for nothing reaches
// nothing.
struct AskedRowsArgs {
  DType type, math;  // of x; of the rest
  const void* grad;  // [T, E]
  const void* x;     // [T, D]
  int64_t num_experts, dim;
  void* rows;  // [T, D]
};

[[gnu::weak]] void gate(const GateArgs& args, int64_t num_tokens, cudaStream_t stream);
[[gnu::weak]] void gate_backward(const GateBackwardArgs& args, int64_t num_tokens, cudaStream_t stream);

// ``order``: the tokens [T] as priority "score" takes them, else null; the scores in args are not looked at.
// ``part_demand``: room for plan_parts(T K) * E integers.
[[gnu::weak]] int64_t plan_parts(int64_t num_choices);
[[gnu::weak]] void plan_routing(const PlanArgs& args, const int64_t* order, int32_t* part_demand, cudaStream_t stream);

// Both gradients, or one of them: grad_x may be null, and ``partial``, room for route_parts(T) * E D of the math type.
[[gnu::weak]] int64_t route_parts(int64_t num_tokens);
[[gnu::weak]] void route_backward(const RouteBackwardArgs& args, void* partial, cudaStream_t stream);
[[gnu::weak]] void asked_rows(const AskedRowsArgs& args, int64_t num_tokens, cudaStream_t stream);
[[gnu::weak]] void permute(const PermuteArgs& args, int64_t num_rows, cudaStream_t stream);
[[gnu::weak]] void combine(const CombineArgs& args, int64_t num_tokens, cudaStream_t stream);
[[gnu::weak]] void combine_backward(const CombineBackwardArgs& args, int64_t num_rows, cudaStream_t stream);

}  // namespace widenet::cuda

// The CUDA kernels: the arguments are those of ../cpu/kernels.h, pointers on the device. Nothing waits for the GPU.
//
// A launch that fails throws std::runtime_error, which names the op.
#pragma once

#include "../cpu/kernels.h"
#include "../cpu/plan.h"

#ifdef __CUDACC__
#include <cuda_runtime.h>
#else
using cudaStream_t = void*;
#endif

namespace widenet::cuda {

void gate(const GateArgs& args, int64_t num_tokens, cudaStream_t stream);
void gate_backward(const GateBackwardArgs& args, int64_t num_tokens, cudaStream_t stream);

// ``order``: the tokens [T] as priority "score" takes them, else null; the scores in args are not looked at.
// ``part_demand``: room for plan_parts(T K) * E integers.
int64_t plan_parts(int64_t num_choices);
void plan_routing(const PlanArgs& args, const int64_t* order, int32_t* part_demand, cudaStream_t stream);

void permute(const PermuteArgs& args, int64_t num_rows, cudaStream_t stream);
void combine(const CombineArgs& args, int64_t num_tokens, cudaStream_t stream);
void combine_backward(const CombineBackwardArgs& args, int64_t num_rows, cudaStream_t stream);

}  // namespace widenet::cuda

// The kernels of one level, by name, so that dispatch.cpp can fill the table.
#pragma once

#include "kernels.h"

#define WIDENET_DECLARE_LEVEL(level)                                         \
  namespace widenet::level {                                                 \
  void gate(const GateArgs&, int64_t, int64_t);                              \
  void gate_backward(const GateBackwardArgs&, int64_t, int64_t);             \
  void route(const RouteArgs&, int64_t, int64_t);                            \
  void route_backward_x(const RouteBackwardArgs&, int64_t, int64_t);         \
  void route_backward_weight(const RouteBackwardArgs&, int64_t, int64_t);    \
  void permute(const PermuteArgs&, int64_t, int64_t);                        \
  void combine(const CombineArgs&, int64_t, int64_t);                        \
  void combine_backward(const CombineBackwardArgs&, int64_t, int64_t);       \
  void activation(const ActivationArgs&, int64_t, int64_t);                  \
  void activation_backward(const ActivationBackwardArgs&, int64_t, int64_t); \
  void column_sum(const ColumnSumArgs&, int64_t, int64_t);                   \
  void reduce_chunks(const ReduceChunksArgs&, int64_t, int64_t);             \
  void weight_gradient(const WeightGradientArgs&, int64_t, int64_t);         \
  void accumulate(const AccumulateArgs&, int64_t, int64_t);                  \
  }
#define WIDENET_DECLARE_GEMM(level)                  \
  namespace widenet::level {                         \
  void gemm_pack(const GemmArgs&, int64_t, int64_t); \
  void gemm(const GemmArgs&, int64_t, int64_t);      \
  void gemm_dots(const GemmArgs&, int64_t, int64_t); \
  extern const GemmTile gemm_tile;                   \
  }

WIDENET_DECLARE_LEVEL(baseline)
WIDENET_DECLARE_LEVEL(avx2)
WIDENET_DECLARE_LEVEL(avx512)
WIDENET_DECLARE_GEMM(baseline)
WIDENET_DECLARE_GEMM(avx2)
WIDENET_DECLARE_GEMM(avx512)
WIDENET_DECLARE_GEMM(avx512_bf16)

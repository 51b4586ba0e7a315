// The experts' rows, and the passes over them that stand around the GEMMs; for grouped_gemm and moe_ffn.
#pragma once

#include <functional>

#include "gemm.h"

namespace widenet {

struct ExpertRows {
  int64_t expert, begin, count;
};

using Experts = std::vector<ExpertRows>;

// Every expert's rows, empty experts included, cut to [0, num_rows).
Experts rows_of_experts(const Tensor& expert_begin, const Tensor& expert_count, int64_t num_rows);
int64_t most_rows(const Experts& experts);

// Does prepare(experts)(), whose products all threads share; or, of small experts, prepare(share)() by every thread,
// which then waits for no other until the end. What prepare allocates, this thread does. `products`: multiplications
// for a row.
using Job = std::function<void()>;
void over_experts(const Experts& experts, int64_t products, const std::function<Job(const Experts&)>& prepare);

// Zeroes the rows of `out` that no expert serves.
void zero_unused_rows(const Matrix& out, const Experts& experts);

Activation activation_of(const std::string& name);

// z += bias of the expert, out = act(z); out may be z unless gated. Without an activation only the bias is added.
void activate(const Matrix& z, const OptionalTensor& bias, int64_t expert, Activation act, const Matrix& out);

// Contiguous rows of uninitialised memory that one expert after the other uses.
class Scratch {
 public:
  Scratch(const Tensor& like, int64_t rows, int64_t columns) : Scratch(like, rows, columns, like.scalar_type()) {}
  Scratch(const Tensor& like, int64_t rows, int64_t columns, ScalarType type)
      : tensor_(empty_tensor(like, {rows, columns}, type)) {}
  Matrix rows(int64_t count) const { return matrix(tensor_).slice(0, count); }
  void* data() const { return tensor_.mutable_data_ptr(); }

 private:
  Tensor tensor_;
};

// Where the gradient of an expert parameter [E, ...] goes: a new tensor, or added into an fp32 buffer.
class GradSink {
 public:
  // Not needed, unless a new tensor is made or a buffer given.
  explicit GradSink(const Tensor& like) : tensor_(nothing(like)), needed_(false), accumulate_(false) {}
  static GradSink new_tensor(const Tensor& tensor) { return GradSink(tensor, false); }
  static GradSink buffer(const Tensor& tensor) { return GradSink(tensor, true); }

  bool needed() const { return needed_; }
  Tensor tensor() const { return tensor_; }

  // d weight[e] (+)= a b.
  void product(int64_t expert, const Matrix& a, const Matrix& b) const;
  // d bias[e] (+)= the sum over chunks of column_sums [chunks, width], in the math type of the rows.
  void sum(int64_t expert, const void* column_sums, DType math, int64_t num_chunks) const;
  // An expert without rows has a gradient of exactly zero.
  void nothing_served(int64_t expert) const;

 private:
  GradSink(const Tensor& tensor, bool accumulate) : tensor_(tensor), needed_(true), accumulate_(accumulate) {}

  Tensor tensor_;
  bool needed_, accumulate_;
};

// The sink for a parameter's gradient: a new tensor of the parameter's layout if it is needed.
GradSink weight_sink(const Tensor& weight, bool needed);
GradSink bias_sink(const Tensor& weight, int64_t width, bool needed);

int64_t num_chunks(int64_t rows);

// column_sums [chunks, width] of row_weight (or 1) * rows.
void sum_columns(const Matrix& rows, const void* row_weight, void* column_sums);

// Runs the activation's backward over num_rows rows.
void activate_backward(const ActivationBackwardArgs& args);

}  // namespace widenet

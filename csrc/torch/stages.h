// The stages as functions on tensors, for the ops that are made of several of them.
#pragma once

#include "../cpu/plan.h"
#include "gemm.h"
#include "tensor.h"

namespace widenet {

struct Gate {
  Tensor weight, expert_index, probs;
};

struct GateGradients {
  OptionalTensor weight, probs, logits;
};

// logits [T, E] -> gate; tokens whose mask is false get index -1 and weight 0.
Gate gate_tokens(const Tensor& logits, const OptionalTensor& noise, const OptionalTensor& mask, int64_t k,
                 bool normalize);
// d logits [T, E].
Tensor gate_gradient(const GateGradients& grads, const Gate& gate, bool normalize);

using Plan = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
// capacity none: dropless; score [T] for priority "score".
Plan plan_tokens(Tensor expert_index, int64_t num_experts, std::optional<int64_t> capacity, std::string priority,
                 OptionalTensor score);

// out [n, D] = x[token of row] for the rows that row_choice [n] begins with; unused rows are zero.
void permute_rows(const Tensor& x, const int32_t* row_choice, int64_t k, const Matrix& out);

// y [T, D] = sum over k of weight (or 1) * (rows + bias); choice_row [T, K].
Tensor combine_rows(const Tensor& rows, const OptionalTensor& weight, const OptionalTensor& bias,
                    const OptionalTensor& expert_begin, const Tensor& choice_row);

}  // namespace widenet

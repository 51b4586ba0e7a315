#include "experts.h"

namespace widenet {
namespace {

std::tuple<Tensor, Tensor> grouped_gemm(Tensor rows_in, Tensor weight, OptionalTensor bias_in, Tensor expert_begin,
                                        Tensor expert_count, std::string activation, bool save) {
  const Tensor rows = to_contiguous(rows_in);
  const OptionalTensor bias = to_contiguous(bias_in);
  const Activation act = activation_of(activation);
  const int64_t num_rows = rows.size(0), width = weight.size(2);
  const auto experts = rows_of_experts(expert_begin, expert_count, num_rows);
  const bool keep = save && act != Activation::none;  // z, for the backward
  const Tensor out = empty_tensor(rows, {num_rows, is_gated(act) ? width / 2 : width});
  const Tensor z = empty_tensor(rows, {keep ? num_rows : 0, width});
  over_experts(experts, rows.size(1) * width, [&](const Experts& share) -> Job {
    const Scratch scratch(rows, is_gated(act) && !keep ? most_rows(share) : 0, width);
    return [&, scratch] {
      for (const auto& [expert, begin, count] : share) {
        if (count == 0) continue;
        const Matrix out_rows = matrix(out).slice(begin, count);
        const Matrix z_rows = keep ? matrix(z).slice(begin, count) : is_gated(act) ? scratch.rows(count) : out_rows;
        gemm(z_rows, matrix(rows).slice(begin, count), matrix(weight, expert));
        activate(z_rows, bias, expert, act, out_rows);
      }
    };
  });
  zero_unused_rows(matrix(out), experts);
  if (keep) zero_unused_rows(matrix(z), experts);
  return {out, z};
}

std::tuple<Tensor, Tensor, Tensor> grouped_gemm_backward(Tensor grad_in, Tensor rows_in, Tensor weight, Tensor z_in,
                                                         Tensor expert_begin, Tensor expert_count,
                                                         std::string activation, bool need_rows, bool need_weight,
                                                         bool need_bias) {
  const Tensor grad = to_contiguous(grad_in), rows = to_contiguous(rows_in), z = to_contiguous(z_in);
  const Activation act = activation_of(activation);
  const int64_t num_rows = rows.size(0), width = weight.size(2);
  const auto experts = rows_of_experts(expert_begin, expert_count, num_rows);
  const bool active = act != Activation::none;
  const Tensor grad_rows = need_rows ? empty_tensor(rows, {num_rows, rows.size(1)}) : nothing(rows);
  const GradSink grad_weight = weight_sink(weight, need_weight), grad_bias = bias_sink(weight, width, need_bias);
  const DType math = dtype_of(math_type(rows));
  over_experts(experts, rows.size(1) * width, [&](const Experts& share) -> Job {
    const int64_t most = most_rows(share);
    const Scratch grad_z(rows, active ? most : 0, width);
    const Scratch sums(rows, need_bias ? num_chunks(most) : 0, width, math_type(rows));
    return [&, grad_z, sums] {
      for (const auto& [expert, begin, count] : share) {
        if (count == 0) {
          grad_weight.nothing_served(expert);
          grad_bias.nothing_served(expert);
          continue;
        }
        Matrix inner = matrix(grad).slice(begin, count);
        if (active) {
          ActivationBackwardArgs args{};
          args.type = dtype_of(rows);
          args.act = act;
          args.num_rows = count;
          args.width = grad.size(1);
          args.z = matrix(z).slice(begin, count).data;
          args.grad = inner.data;
          args.grad_z = grad_z.data();
          args.column_sums = need_bias ? sums.data() : nullptr;
          activate_backward(args);
          inner = grad_z.rows(count);
        } else if (need_bias) {
          sum_columns(inner, nullptr, sums.data());
        }
        if (need_bias) grad_bias.sum(expert, sums.data(), math, num_chunks(count));
        if (need_weight) grad_weight.product(expert, matrix(rows).slice(begin, count).transposed(), inner);
        if (need_rows) gemm(matrix(grad_rows).slice(begin, count), inner, matrix(weight, expert).transposed());
      }
    };
  });
  if (need_rows) zero_unused_rows(matrix(grad_rows), experts);
  return {grad_rows, grad_weight.tensor(), grad_bias.tensor()};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(widenet_kernels, CPU, m) {
  m.impl("grouped_gemm", TORCH_BOX(&grouped_gemm));
  m.impl("grouped_gemm_backward", TORCH_BOX(&grouped_gemm_backward));
}

}  // namespace widenet

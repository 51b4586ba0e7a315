// moe_ffn: gather, GEMM, bias + activation, GEMM, expert by expert; then combine over all of them.
//
// One expert's rows are gathered into a scratch that the next expert uses again, so they are still in cache when the
// GEMM reads them. The second bias is added in combine. The backward recomputes act(z) and gathers x and dy again;
// with h = act(z) and per row w = gate weight, g = dy w2^T (not yet scaled):
//   d w = <g, h> + <dy, b2>     d w2 = (w h)^T dy     d b2 = sum of w dy
//   d z = w g act'(z)           d w1 = x^T dz         d b1 = sum of dz        d x = dz w1^T, summed over k
#include "../cpu/parallel.h"
#include "experts.h"
#include "stages.h"

namespace widenet {
namespace {

std::tuple<Tensor, Tensor> moe_ffn(Tensor x_in, Tensor weight, Tensor choice_row_in, Tensor row_choice_in,
                                   Tensor expert_begin, Tensor expert_count, Tensor w1, OptionalTensor b1_in, Tensor w2,
                                   OptionalTensor b2_in, std::string activation, bool save, OptionalTensor,
                                   OptionalTensor, OptionalTensor, OptionalTensor) {
  const Tensor x = to_contiguous(x_in), choice_row = to_contiguous(choice_row_in),
               row_choice = to_contiguous(row_choice_in);
  const OptionalTensor b1 = to_contiguous(b1_in), b2 = to_contiguous(b2_in), begins = to_contiguous(expert_begin);
  const Activation act = activation_of(activation);
  const int64_t num_rows = row_choice.size(0), dim = x.size(1), width = w1.size(2), hidden = w2.size(1);
  const auto experts = rows_of_experts(expert_begin, expert_count, num_rows);
  const int64_t most = most_rows(experts);
  const bool in_place = !save && !is_gated(act);  // act(z) takes the place of z
  const Tensor z = empty_tensor(x, {save ? num_rows : 0, width}), out = empty_tensor(x, {num_rows, dim});
  const Scratch x_rows(x, most, dim), z_scratch(x, save ? 0 : most, width), h_scratch(x, in_place ? 0 : most, hidden);
  for (const auto& [expert, begin, count] : experts) {
    if (count == 0) continue;
    const Matrix gathered = x_rows.rows(count);
    const Matrix z_rows = save ? matrix(z).slice(begin, count) : z_scratch.rows(count);
    const Matrix h = in_place ? z_rows : h_scratch.rows(count);
    permute_rows(x, integers(row_choice) + begin, choice_row.size(1), gathered);
    gemm(z_rows, gathered, matrix(w1, expert));
    activate(z_rows, b1, expert, act, h);
    gemm(matrix(out).slice(begin, count), h, matrix(w2, expert));
  }
  return {combine_rows(out, weight, b2, begins, choice_row), z};
}

struct Sinks {
  GradSink w1, b1, w2, b2;
};

// What the two forms of the backward share: everything but where the experts' gradients go.
struct Backward {
  Tensor grad, x, weight, choice_row, row_choice, expert_begin, expert_count, z, w1, w2;
  OptionalTensor b2;
  Activation act;
  bool need_x, need_weight;

  std::tuple<Tensor, Tensor> run(const Sinks& sinks) const;
};

std::tuple<Tensor, Tensor> Backward::run(const Sinks& sinks) const {
  const int64_t num_rows = row_choice.size(0), k = choice_row.size(1), dim = x.size(1);
  const int64_t width = w1.size(2), hidden = w2.size(1);
  const auto experts = rows_of_experts(expert_begin, expert_count, num_rows);
  const int64_t most = most_rows(experts), chunks = num_chunks(most);
  const ScalarType math = math_type(x);
  const DType type = dtype_of(x), math_dtype = math == ScalarType::Double ? DType::f64 : DType::f32;
  const Tensor choice_weight = to_contiguous(weight, math);
  const Tensor flat_weight = torch::stable::view(choice_weight, Sizes{choice_weight.numel(), 1});

  const bool need_z = need_x || sinks.w1.needed() || sinks.b1.needed(), need_h = need_z || need_weight;
  const Scratch x_rows(x, sinks.w1.needed() ? most : 0, dim), grad_rows(x, most, dim);
  const Scratch row_weight(x, most, 1, math), dot(x, need_weight ? most : 0, 1, math);
  const Scratch grad_h(x, need_h ? most : 0, hidden), gated_grad_z(x, need_z && is_gated(act) ? most : 0, width);
  const Scratch scaled_h(x, sinks.w2.needed() ? most : 0, hidden);
  const Scratch sums1(x, sinks.b1.needed() ? chunks : 0, width, math),
      sums2(x, sinks.b2.needed() ? chunks : 0, dim, math);
  const Tensor grad_x_rows = empty_tensor(x, {need_x ? num_rows : 0, dim});
  Tensor grad_weight = need_weight ? empty_tensor(x, {weight.size(0), k}, math) : nothing(x);
  if (need_weight) torch::stable::zero_(grad_weight);

  for (const auto& [expert, begin, count] : experts) {
    if (count == 0) {
      for (const GradSink* sink : {&sinks.w1, &sinks.b1, &sinks.w2, &sinks.b2}) sink->nothing_served(expert);
      continue;
    }
    const int32_t* choices = integers(row_choice) + begin;
    const Matrix dy = grad_rows.rows(count), h_scaled = scaled_h.rows(sinks.w2.needed() ? count : 0);
    const Matrix grad_z = is_gated(act) ? gated_grad_z.rows(need_z ? count : 0) : grad_h.rows(need_h ? count : 0);
    permute_rows(grad, choices, k, dy);
    permute_rows(flat_weight, choices, 1, row_weight.rows(count));
    if (need_h) gemm(grad_h.rows(count), dy, matrix(w2, expert).transposed());

    if (need_h || sinks.w2.needed()) {
      activate_backward({type, act, count, hidden, matrix(z).slice(begin, count).data, need_h ? grad_h.data() : nullptr,
                         row_weight.data(), need_z ? grad_z.data : nullptr, sinks.w2.needed() ? h_scaled.data : nullptr,
                         need_weight ? dot.data() : nullptr, sinks.b1.needed() ? sums1.data() : nullptr});
    }
    if (need_weight) {
      const WeightGradientArgs args{type,    weight.numel(),
                                    dim,     dot.data(),
                                    dy.data, b2 ? row_of(*b2, expert) : nullptr,
                                    choices, grad_weight.mutable_data_ptr()};
      parallel_for(count, 64, [&](int64_t first, int64_t last) { kernels().weight_gradient(args, first, last); });
    }
    if (sinks.w2.needed()) sinks.w2.product(expert, h_scaled.transposed(), dy);
    if (sinks.b2.needed()) {
      sum_columns(dy, row_weight.data(), sums2.data());
      sinks.b2.sum(expert, sums2.data(), math_dtype, num_chunks(count));
    }
    if (sinks.b1.needed()) sinks.b1.sum(expert, sums1.data(), math_dtype, num_chunks(count));
    if (sinks.w1.needed()) {
      permute_rows(x, choices, k, x_rows.rows(count));
      sinks.w1.product(expert, x_rows.rows(count).transposed(), grad_z);
    }
    if (need_x) gemm(matrix(grad_x_rows).slice(begin, count), grad_z, matrix(w1, expert).transposed());
  }
  const Tensor grad_x =
      need_x ? combine_rows(grad_x_rows, std::nullopt, std::nullopt, std::nullopt, choice_row) : nothing(x);
  return {grad_x, to_contiguous(grad_weight, weight.scalar_type())};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> moe_ffn_backward(
    Tensor grad, Tensor x, Tensor weight, Tensor choice_row, Tensor row_choice, Tensor expert_begin,
    Tensor expert_count, Tensor z, Tensor w1, Tensor w2, OptionalTensor b2, std::string activation, bool need_x,
    bool need_weight, bool need_w1, bool need_b1, bool need_w2, bool need_b2) {
  const Backward backward{to_contiguous(grad),
                          to_contiguous(x),
                          weight,
                          to_contiguous(choice_row),
                          to_contiguous(row_choice),
                          expert_begin,
                          expert_count,
                          to_contiguous(z),
                          w1,
                          w2,
                          to_contiguous(b2),
                          activation_of(activation),
                          need_x,
                          need_weight};
  const Sinks sinks{weight_sink(w1, need_w1), bias_sink(w1, w1.size(2), need_b1), weight_sink(w2, need_w2),
                    bias_sink(w2, w2.size(2), need_b2)};
  const auto [grad_x, grad_weight] = backward.run(sinks);
  return {grad_x, grad_weight, sinks.w1.tensor(), sinks.b1.tensor(), sinks.w2.tensor(), sinks.b2.tensor()};
}

std::tuple<Tensor, Tensor> moe_ffn_backward_accumulate(Tensor grad, Tensor x, Tensor weight, Tensor choice_row,
                                                       Tensor row_choice, Tensor expert_begin, Tensor expert_count,
                                                       Tensor z, Tensor w1, Tensor w2, OptionalTensor b2,
                                                       std::string activation, bool need_x, bool need_weight,
                                                       OptionalTensor grad_w1, OptionalTensor grad_b1,
                                                       OptionalTensor grad_w2, OptionalTensor grad_b2) {
  const Backward backward{to_contiguous(grad),
                          to_contiguous(x),
                          weight,
                          to_contiguous(choice_row),
                          to_contiguous(row_choice),
                          expert_begin,
                          expert_count,
                          to_contiguous(z),
                          w1,
                          w2,
                          to_contiguous(b2),
                          activation_of(activation),
                          need_x,
                          need_weight};
  const auto sink = [&](const OptionalTensor& buffer) { return buffer ? GradSink::buffer(*buffer) : GradSink(w1); };
  return backward.run({sink(grad_w1), sink(grad_b1), sink(grad_w2), sink(grad_b2)});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(widenet_kernels, CPU, m) {
  m.impl("moe_ffn", TORCH_BOX(&moe_ffn));
  m.impl("moe_ffn_backward", TORCH_BOX(&moe_ffn_backward));
  m.impl("moe_ffn_backward_accumulate", TORCH_BOX(&moe_ffn_backward_accumulate));
}

}  // namespace widenet

// moe_ffn: gather, GEMM, bias + activation, GEMM, expert by expert; then combine over all of them.
//
// One expert's rows are gathered into a scratch that the next expert of the same share uses again, so they are still in
// cache when the GEMM reads them. The second bias is added in combine. The backward recomputes act(z) and gathers x and
// dy again; with h = act(z) and per row w = gate weight, g = dy w2^T (not yet scaled):
//   d w = <g, h> + <dy, b2>     d w2 = (w h)^T dy     d b2 = sum of w dy
//   d z = w g act'(z)           d w1 = x^T dz         d b1 = sum of dz        d x = dz w1^T, summed over k
#include "../cpu/parallel.h"
#include "experts.h"
#include "stages.h"

namespace widenet {
namespace {

constexpr int64_t kGrainRows = 64;

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
  const bool in_place = !save && !is_gated(act);  // act(z) takes the place of z
  const Tensor z = empty_tensor(x, {save ? num_rows : 0, width}), out = empty_tensor(x, {num_rows, dim});
  over_experts(experts, dim * (width + hidden), [&](const Experts& share) -> Job {
    const int64_t most = most_rows(share);
    const Scratch x_rows(x, most, dim), z_scratch(x, save ? 0 : most, width), h_scratch(x, in_place ? 0 : most, hidden);
    return [&, x_rows, z_scratch, h_scratch] {
      for (const auto& [expert, begin, count] : share) {
        if (count == 0) continue;
        const Matrix gathered = x_rows.rows(count);
        const Matrix z_rows = save ? matrix(z).slice(begin, count) : z_scratch.rows(count);
        const Matrix h = in_place ? z_rows : h_scratch.rows(count);
        permute_rows(x, integers(row_choice) + begin, choice_row.size(1), gathered);
        gemm(z_rows, gathered, matrix(w1, expert));
        activate(z_rows, b1, expert, act, h);
        gemm(matrix(out).slice(begin, count), h, matrix(w2, expert));
      }
    };
  });
  return {combine_rows(out, weight, b2, begins, choice_row), z};
}

// What the backward is given, contiguous where the kernels need it.
struct Given {
  Tensor grad, x, weight, choice_row, row_choice, expert_begin, expert_count, z, w1, w2;
  OptionalTensor b2;
  Activation act;
  bool need_x, need_weight;
};

Given given(Tensor grad, Tensor x, Tensor weight, Tensor choice_row, Tensor row_choice, Tensor expert_begin,
            Tensor expert_count, Tensor z, Tensor w1, Tensor w2, OptionalTensor b2, const std::string& activation,
            bool need_x, bool need_weight) {
  return {to_contiguous(grad),
          to_contiguous(x),
          to_contiguous(weight, math_type(x)),
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
}

struct Sinks {
  GradSink w1, b1, w2, b2;
};

// The memory that one expert after the other uses; of no rows where nothing is needed.
struct BackwardScratch {
  Scratch x, dy, row_weight, dot, grad_h, gated_grad_z, scaled_h, sums1, sums2;
};

class Backward {
 public:
  Backward(const Given& given, const Sinks& sinks)
      : g_(given),
        sinks_(sinks),
        experts_(rows_of_experts(given.expert_begin, given.expert_count, given.row_choice.size(0))),
        need_z_(given.need_x || sinks.w1.needed() || sinks.b1.needed()),
        need_h_(need_z_ || given.need_weight),
        flat_weight_(torch::stable::view(given.weight, Sizes{given.weight.numel(), 1})),
        grad_x_rows_(empty_tensor(given.x, {given.need_x ? given.row_choice.size(0) : 0, given.x.size(1)})),
        grad_weight_(given.need_weight ? empty_tensor(given.weight, {given.weight.size(0), given.weight.size(1)})
                                       : nothing(given.weight)) {
    if (given.need_weight) torch::stable::zero_(grad_weight_);
  }

  // d x and d weight, the latter in the math type; the experts' gradients go into the sinks.
  std::tuple<Tensor, Tensor> run() {
    over_experts(experts_, g_.x.size(1) * (g_.w1.size(2) + g_.w2.size(1)), [&](const Experts& share) -> Job {
      return [this, &share, scratch = make_scratch(share)] {
        for (const ExpertRows& rows : share) differentiate(rows, scratch);
      };
    });
    const OptionalTensor none;
    return {g_.need_x ? combine_rows(grad_x_rows_, none, none, none, g_.choice_row) : nothing(g_.x), grad_weight_};
  }

 private:
  void differentiate(const ExpertRows& rows, const BackwardScratch& scratch) const {
    if (rows.count > 0) {
      gather(rows, scratch);
      differentiate_hidden(rows, scratch);
      differentiate_second_layer(rows, scratch);
      differentiate_first_layer(rows, scratch);
    } else {
      for (const GradSink* sink : {&sinks_.w1, &sinks_.b1, &sinks_.w2, &sinks_.b2}) sink->nothing_served(rows.expert);
    }
  }

  BackwardScratch make_scratch(const Experts& share) const {
    const int64_t most = most_rows(share), dim = g_.x.size(1), width = g_.w1.size(2), hidden = g_.w2.size(1);
    const ScalarType math = g_.weight.scalar_type();
    const auto rows = [most](bool needed) { return needed ? most : 0; };
    return {Scratch(g_.x, rows(sinks_.w1.needed()), dim),
            Scratch(g_.x, most, dim),
            Scratch(g_.x, most, 1, math),
            Scratch(g_.x, rows(g_.need_weight), 1, math),
            Scratch(g_.x, rows(need_h_), hidden),
            Scratch(g_.x, rows(need_z_ && is_gated(g_.act)), width),
            Scratch(g_.x, rows(sinks_.w2.needed()), hidden),
            Scratch(g_.x, num_chunks(rows(sinks_.b1.needed())), width, math),
            Scratch(g_.x, num_chunks(rows(sinks_.b2.needed())), dim, math)};
  }

  const int32_t* choices(const ExpertRows& rows) const { return integers(g_.row_choice) + rows.begin; }

  // Where d z goes: over d h, unless a gated z is wider.
  Matrix grad_z(const ExpertRows& rows, const BackwardScratch& scratch) const {
    return (is_gated(g_.act) ? scratch.gated_grad_z : scratch.grad_h).rows(rows.count);
  }

  // The rows of dy and the gate weights of their choices.
  void gather(const ExpertRows& rows, const BackwardScratch& scratch) const {
    permute_rows(g_.grad, choices(rows), g_.choice_row.size(1), scratch.dy.rows(rows.count));
    permute_rows(flat_weight_, choices(rows), 1, scratch.row_weight.rows(rows.count));
  }

  // g = dy w2^T, then in one pass d z, w h, <g, h> and the sums for d b1; d weight from <g, h>.
  void differentiate_hidden(const ExpertRows& rows, const BackwardScratch& scratch) const {
    const bool need_scaled = sinks_.w2.needed();
    const Matrix dy = scratch.dy.rows(rows.count);
    if (need_h_) gemm(scratch.grad_h.rows(rows.count), dy, matrix(g_.w2, rows.expert).transposed());
    if (need_h_ || need_scaled) {
      activate_backward({dtype_of(g_.x), g_.act, rows.count, g_.w2.size(1),
                         matrix(g_.z).slice(rows.begin, rows.count).data, need_h_ ? scratch.grad_h.data() : nullptr,
                         scratch.row_weight.data(), need_z_ ? grad_z(rows, scratch).data : nullptr,
                         need_scaled ? scratch.scaled_h.data() : nullptr, g_.need_weight ? scratch.dot.data() : nullptr,
                         sinks_.b1.needed() ? scratch.sums1.data() : nullptr});
    }
    if (g_.need_weight) {
      const void* bias = g_.b2 ? row_of(*g_.b2, rows.expert) : nullptr;
      const WeightGradientArgs args{dtype_of(g_.x), g_.weight.numel(),
                                    dy.columns,     scratch.dot.data(),
                                    dy.data,        bias,
                                    choices(rows),  grad_weight_.mutable_data_ptr()};
      parallel_for(rows.count, kGrainRows,
                   [&](int64_t begin, int64_t end) { kernels().weight_gradient(args, begin, end); });
    }
  }

  void differentiate_second_layer(const ExpertRows& rows, const BackwardScratch& scratch) const {
    const Matrix dy = scratch.dy.rows(rows.count);
    if (sinks_.w2.needed()) sinks_.w2.product(rows.expert, scratch.scaled_h.rows(rows.count).transposed(), dy);
    if (sinks_.b2.needed()) {
      sum_columns(dy, scratch.row_weight.data(), scratch.sums2.data());
      sinks_.b2.sum(rows.expert, scratch.sums2.data(), dtype_of(g_.weight), num_chunks(rows.count));
    }
  }

  void differentiate_first_layer(const ExpertRows& rows, const BackwardScratch& scratch) const {
    if (sinks_.b1.needed()) {
      sinks_.b1.sum(rows.expert, scratch.sums1.data(), dtype_of(g_.weight), num_chunks(rows.count));
    }
    if (sinks_.w1.needed()) {
      const Matrix x_rows = scratch.x.rows(rows.count);
      permute_rows(g_.x, choices(rows), g_.choice_row.size(1), x_rows);
      sinks_.w1.product(rows.expert, x_rows.transposed(), grad_z(rows, scratch));
    }
    if (g_.need_x) {
      const Matrix grad_x_rows = matrix(grad_x_rows_).slice(rows.begin, rows.count);
      gemm(grad_x_rows, grad_z(rows, scratch), matrix(g_.w1, rows.expert).transposed());
    }
  }

  const Given& g_;
  const Sinks& sinks_;
  const Experts experts_;
  const bool need_z_, need_h_;  // whether d z is needed, and d h, from which d z and d weight are made
  const Tensor flat_weight_, grad_x_rows_;
  Tensor grad_weight_;
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> moe_ffn_backward(
    Tensor grad, Tensor x, Tensor weight, Tensor choice_row, Tensor row_choice, Tensor expert_begin,
    Tensor expert_count, Tensor z, Tensor w1, Tensor w2, OptionalTensor b2, std::string activation, bool need_x,
    bool need_weight, bool need_w1, bool need_b1, bool need_w2, bool need_b2) {
  const Given all = given(grad, x, weight, choice_row, row_choice, expert_begin, expert_count, z, w1, w2, b2,
                          activation, need_x, need_weight);
  const Sinks sinks{weight_sink(w1, need_w1), bias_sink(w1, w1.size(2), need_b1), weight_sink(w2, need_w2),
                    bias_sink(w2, w2.size(2), need_b2)};
  const auto [grad_x, grad_weight] = Backward(all, sinks).run();
  return {grad_x,
          to_contiguous(grad_weight, weight.scalar_type()),
          sinks.w1.tensor(),
          sinks.b1.tensor(),
          sinks.w2.tensor(),
          sinks.b2.tensor()};
}

std::tuple<Tensor, Tensor> moe_ffn_backward_accumulate(Tensor grad, Tensor x, Tensor weight, Tensor choice_row,
                                                       Tensor row_choice, Tensor expert_begin, Tensor expert_count,
                                                       Tensor z, Tensor w1, Tensor w2, OptionalTensor b2,
                                                       std::string activation, bool need_x, bool need_weight,
                                                       OptionalTensor grad_w1, OptionalTensor grad_b1,
                                                       OptionalTensor grad_w2, OptionalTensor grad_b2) {
  const Given all = given(grad, x, weight, choice_row, row_choice, expert_begin, expert_count, z, w1, w2, b2,
                          activation, need_x, need_weight);
  const auto sink = [&](const OptionalTensor& buffer) { return buffer ? GradSink::buffer(*buffer) : GradSink(w1); };
  const Sinks sinks{sink(grad_w1), sink(grad_b1), sink(grad_w2), sink(grad_b2)};
  const auto [grad_x, grad_weight] = Backward(all, sinks).run();
  return {grad_x, to_contiguous(grad_weight, weight.scalar_type())};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(widenet_kernels, CPU, m) {
  m.impl("moe_ffn", TORCH_BOX(&moe_ffn));
  m.impl("moe_ffn_backward", TORCH_BOX(&moe_ffn_backward));
  m.impl("moe_ffn_backward_accumulate", TORCH_BOX(&moe_ffn_backward_accumulate));
}

}  // namespace widenet

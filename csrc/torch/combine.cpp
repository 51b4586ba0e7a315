#include "device.h"
#include "stages.h"

namespace widenet {
namespace {

Tensor combine(Tensor rows, Tensor weight, Tensor choice_row, Tensor) {
  return combine_rows(to_contiguous(rows), weight, std::nullopt, std::nullopt, to_contiguous(choice_row));
}

std::tuple<Tensor, Tensor> combine_backward(Tensor grad_in, Tensor rows_in, Tensor weight_in, Tensor choice_row_in,
                                            Tensor row_choice_in, bool need_rows, bool need_weight) {
  const Tensor grad = to_contiguous(grad_in), rows = to_contiguous(rows_in);
  const Tensor choice_row = to_contiguous(choice_row_in), row_choice = to_contiguous(row_choice_in);
  const ScalarType math = math_type(rows, weight_in);
  const Tensor weight = to_contiguous(weight_in, math);
  const int64_t num_rows = rows.size(0), dim = rows.size(1), num_tokens = weight.size(0), k = weight.size(1);
  const Tensor grad_rows = need_rows ? empty_tensor(rows, {num_rows, dim}) : nothing(rows);
  Tensor grad_weight = need_weight ? empty_tensor(rows, {num_tokens, k}, math) : nothing(weight);
  if (need_weight && !on_gpu(rows)) torch::stable::zero_(grad_weight);
  const CombineBackwardArgs args{dtype_of(rows),
                                 dtype_of(weight),
                                 data(grad),
                                 data(rows),
                                 data(weight),
                                 integers(choice_row),
                                 integers(row_choice),
                                 num_tokens,
                                 k,
                                 dim,
                                 need_rows ? grad_rows.mutable_data_ptr() : nullptr,
                                 need_weight ? grad_weight.mutable_data_ptr() : nullptr};
  run(rows, kernels().combine_backward, cuda::combine_backward, args, num_rows, kGrainElements / (dim + 1) + 1);
  return {grad_rows, to_contiguous(grad_weight, weight_in.scalar_type())};
}

}  // namespace

Tensor combine_rows(const Tensor& rows, const OptionalTensor& weight_in, const OptionalTensor& bias,
                    const OptionalTensor& expert_begin, const Tensor& choice_row) {
  const ScalarType math = weight_in ? math_type(rows, *weight_in) : math_type(rows);
  const OptionalTensor weight = to_contiguous(weight_in, math);
  const int64_t num_tokens = choice_row.size(0), dim = rows.size(1);
  const Tensor y = empty_tensor(rows, {num_tokens, dim});
  const CombineArgs args{dtype_of(rows),
                         dtype_of(math),
                         data(rows),
                         data(weight),
                         data(bias),
                         integers(choice_row),
                         static_cast<const int32_t*>(data(expert_begin)),
                         rows.size(0),
                         expert_begin ? expert_begin->size(0) : 0,
                         choice_row.size(1),
                         dim,
                         y.mutable_data_ptr()};
  run(rows, kernels().combine, cuda::combine, args, num_tokens, kGrainElements / (dim * choice_row.size(1) + 1) + 1);
  return y;
}

WIDENET_OPS(m) {
  m.impl("combine", TORCH_BOX(&combine));
  m.impl("combine_backward", TORCH_BOX(&combine_backward));
}

}  // namespace widenet

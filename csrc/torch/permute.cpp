#include "device.h"
#include "stages.h"

namespace widenet {
namespace {

constexpr int64_t kGrainBytes = 1 << 15;

Tensor permute(Tensor x, Tensor choice_row, Tensor row_choice) {
  const Tensor rows = empty_tensor(x, {row_choice.size(0), x.size(1)});
  const Tensor order = to_contiguous(row_choice);
  permute_rows(to_contiguous(x), integers(order), choice_row.size(1), matrix(rows));
  return rows;
}

Tensor permute_backward(Tensor grad, Tensor choice_row) {
  return combine_rows(to_contiguous(grad), std::nullopt, std::nullopt, std::nullopt, to_contiguous(choice_row));
}

}  // namespace

void permute_rows(const Tensor& x, const int32_t* row_choice, int64_t k, const Matrix& out) {
  const int64_t row_bytes = out.columns * static_cast<int64_t>(x.element_size());
  const PermuteArgs args{data(x), row_choice, x.size(0), k, row_bytes, out.data};
  run(x, kernels().permute, cuda::permute, args, out.rows, kGrainBytes / (row_bytes + 1) + 1);
}

WIDENET_OPS(m) {
  m.impl("permute", TORCH_BOX(&permute));
  m.impl("permute_backward", TORCH_BOX(&permute_backward));
}

}  // namespace widenet

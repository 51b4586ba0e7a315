#include "../cpu/parallel.h"
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
  parallel_for(out.rows, kGrainBytes / (row_bytes + 1) + 1,
               [&](int64_t begin, int64_t end) { kernels().permute(args, begin, end); });
}

STABLE_TORCH_LIBRARY_IMPL(widenet_kernels, CPU, m) {
  m.impl("permute", TORCH_BOX(&permute));
  m.impl("permute_backward", TORCH_BOX(&permute_backward));
}

}  // namespace widenet

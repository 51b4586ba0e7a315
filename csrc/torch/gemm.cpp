#include "gemm.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <array>

namespace widenet {
namespace {

Tensor view(const Matrix& m) {
  const std::array<int64_t, 2> sizes{m.rows, m.columns}, strides{m.row_stride, m.column_stride};
  static const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  return torch::stable::from_blob(m.data, {sizes.data(), 2}, {strides.data(), 2}, cpu, m.type);
}

}  // namespace

Matrix matrix(const Tensor& t) {
  return {const_cast<void*>(data(t)), t.size(0), t.size(1), t.stride(0), t.stride(1), t.scalar_type()};
}

Matrix matrix(const Tensor& t, int64_t expert) {
  char* first = static_cast<char*>(const_cast<void*>(data(t)));
  const int64_t offset = expert * t.stride(0) * static_cast<int64_t>(t.element_size());
  return {first + offset, t.size(1), t.size(2), t.stride(1), t.stride(2), t.scalar_type()};
}

void gemm(const Matrix& out, const Matrix& a, const Matrix& b, bool accumulate) {
  const Tensor out_view = view(out), a_view = view(a), b_view = view(b);
  if (accumulate) {
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_cpu_addmm_out(out_view.get(), out_view.get(), a_view.get(), b_view.get(), 1.0, 1.0));
  } else {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out_view.get(), a_view.get(), b_view.get()));
  }
}

void zero(const Matrix& out) {
  Tensor out_view = view(out);
  torch::stable::zero_(out_view);
}

}  // namespace widenet

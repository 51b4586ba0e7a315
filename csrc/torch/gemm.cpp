#include "gemm.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <array>

#include "../cpu/gemm.h"

namespace widenet {
namespace {

constexpr int64_t kLeastRows = 4, kMostRows = 40;  // of products of fp32 for which MKL packs longer than we multiply

Tensor view(const Matrix& m) {
  const std::array<int64_t, 2> sizes{m.rows, m.columns}, strides{m.row_stride, m.column_stride};
  static const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  return torch::stable::from_blob(m.data, {sizes.data(), 2}, {strides.data(), 2}, cpu, m.type);
}

// What torch says of oneDNN; a torch without it has no such op.
bool mkldnn_has(const char* question) {
  std::array<StableIValue, 1> stack{};
  return torch_call_dispatcher(question, "", stack.data(), TORCH_ABI_VERSION) == 0 &&
         torch::stable::detail::to<bool>(stack[0]);
}

// Whether torch's GEMM is slow here. MKL does without AVX-512 on CPUs that are not Intel's; without oneDNN torch
// multiplies bf16 and fp16 in plain loops; and oneDNN takes bf16 on Intel's CPUs in pairs, half as fast as our floats,
// or slower still, unless they have instructions for tiles.
bool is_slow_in_torch(ScalarType type) {
  static const bool f32 = !is_intel();
  static const bool bf16 = !mkldnn_has("mkldnn::_is_mkldnn_bf16_supported") || (is_intel() && !has_tiles());
  static const bool f16 = !mkldnn_has("mkldnn::_is_mkldnn_fp16_supported");
  return type == ScalarType::Float ? f32 : type == ScalarType::BFloat16 ? bf16 : type == ScalarType::Half && f16;
}

// Where it is not slow, there are products that we do faster. Where both multiply bf16 in pairs: those with a b whose
// rows lie in one piece and, of few rows, one whose columns do; else oneDNN is as fast on a b that has to be
// transposed. Where MKL is at home: those of few rows that need no packing.
bool is_faster_here(const Product& product) {
  const bool pairs = kernels().gemm_tile->pairs;
  if (product.type == DType::bf16) return pairs && (product.b.column_stride == 1 || by_dots(kernels(), product));
  return product.type == DType::f32 && product.m >= kLeastRows && product.m <= kMostRows && by_dots(kernels(), product);
}

Product product_of(const Matrix& out, const Matrix& a, const Matrix& b, bool accumulate) {
  return {dtype_of(a.type),
          out.rows,
          out.columns,
          a.columns,
          {a.data, a.row_stride, a.column_stride},
          {b.data, b.row_stride, b.column_stride},
          dtype_of(out.type),
          accumulate,
          out.data,
          out.row_stride};
}

// Multiplies by our own kernels, if they can and torch is slower.
bool own_gemm(const Matrix& out, const Matrix& a, const Matrix& b, bool accumulate) {
  static const bool wide = kernels().gemm_tile->columns >= 16;  // vectors; with others we are slower
  if (!wide || !out.rows || !out.columns || !a.columns || out.column_stride != 1) return false;
  const Product product = product_of(out, a, b, accumulate);
  if (!is_slow_in_torch(a.type) && !is_faster_here(product)) return false;
  const int64_t size = workspace_size(kernels(), product);
  if (size == 0) {
    multiply(kernels(), product, nullptr);
  } else {
    const Tensor workspace = new_tensor({size}, ScalarType::Float, aoti_torch_device_type_cpu(), 0);
    multiply(kernels(), product, static_cast<float*>(workspace.mutable_data_ptr()));
  }
  return true;
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
  if (own_gemm(out, a, b, accumulate) || own_gemm(out.transposed(), b.transposed(), a.transposed(), accumulate)) return;
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

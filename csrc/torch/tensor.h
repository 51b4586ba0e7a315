// What every op needs of LibTorch's stable ABI: tensors as pointers, dtypes, new tensors.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../cpu/kernels.h"
#include "memory.h"

namespace widenet {

using OptionalTensor = std::optional<Tensor>;

inline DType dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::Double:
      return DType::f64;
    default:
      STD_TORCH_CHECK(false, "widenet_kernels: expected fp32, bf16, fp16 or fp64");
      return DType::f32;
  }
}
inline DType dtype_of(const Tensor& t) { return dtype_of(t.scalar_type()); }

constexpr int64_t kGrainElements = 1 << 14;  // a thread's least share of a loop over elements

// The dtype in which gates and sums are computed: f64 if anything is.
inline ScalarType math_type(const Tensor& a) {
  return a.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}
inline ScalarType math_type(const Tensor& a, const Tensor& b) {
  return math_type(a) == ScalarType::Double ? ScalarType::Double : math_type(b);
}

inline Tensor to_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// One of torch's own ops, on behalf of ``op``, which an error names beside the cause: a torch from 2.13 on tells it.
inline void call_torch(const char* op, const char* name, const char* overload, StableIValue* stack) {
  if (torch_call_dispatcher(name, overload, stack, TORCH_ABI_VERSION) == 0) return;
  static const auto cause =
      reinterpret_cast<const char* (*)()>(dlsym(RTLD_DEFAULT, "torch_exception_get_what_without_backtrace"));
  STD_TORCH_CHECK(false, op, ": ", name, " failed: ", cause ? cause() : "this version of torch does not say why");
}

// Contiguous and of the given dtype; the tensor itself if it is so already.
inline Tensor to_contiguous(const Tensor& t, ScalarType dtype) {
  return to_contiguous(t.scalar_type() == dtype ? t : torch::stable::to(t, dtype));
}

template <class... Dtype>
OptionalTensor to_contiguous(const OptionalTensor& t, Dtype... dtype) {
  return t ? OptionalTensor(to_contiguous(*t, dtype...)) : std::nullopt;
}

// Contiguous and uninitialised.
inline Tensor new_tensor(const Sizes& sizes, ScalarType dtype, int32_t device_type, int32_t device) {
  Sizes strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
  return new_tensor(sizes, strides, dtype, device_type, device);
}

inline Tensor empty_tensor(const Tensor& like, const Sizes& sizes, ScalarType dtype) {
  int32_t device_type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  return new_tensor(sizes, dtype, device_type, like.get_device_index());
}
inline Tensor empty_tensor(const Tensor& like, const Sizes& sizes) {
  return empty_tensor(like, sizes, like.scalar_type());
}

// What an op returns for a gradient that nobody needs.
inline Tensor nothing(const Tensor& like) { return empty_tensor(like, {0}); }

inline const void* data(const Tensor& t) { return t.const_data_ptr(); }
inline const void* data(const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; }

inline const int32_t* integers(const Tensor& t) { return static_cast<const int32_t*>(t.const_data_ptr()); }

// Byte address of a row of a contiguous tensor.
inline char* row_of(const Tensor& t, int64_t row) {
  const int64_t stride = t.dim() > 1 ? t.stride(0) : 1;
  return static_cast<char*>(const_cast<void*>(t.const_data_ptr())) +
         row * stride * static_cast<int64_t>(t.element_size());
}

}  // namespace widenet

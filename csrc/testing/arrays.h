// NumPy arrays as what the kernels take: checked arguments, and new arrays for what they write.
//
// bfloat16, which NumPy lacks, travels as uint16. Arrays are C-contiguous; a wrong one raises before a kernel starts.
// Results begin as bytes of 0xff (NaN, or -1), so that what a kernel forgets to write shows, and an empty array is a
// null pointer, as it is in torch.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "../cpu/kernels.h"

namespace widenet {

namespace py = pybind11;
using py::array;
using Optional = std::optional<array>;
using Shape = std::vector<py::ssize_t>;

inline void require(bool right, const std::string& argument, const std::string& expected) {
  if (!right) throw std::invalid_argument(argument + ": expected " + expected);
}

inline py::dtype numpy_dtype(DType type) {
  return py::dtype(type == DType::f32    ? "float32"
                   : type == DType::f64  ? "float64"
                   : type == DType::bf16 ? "uint16"
                                         : "float16");
}

inline DType float_dtype(const char* name, const array& a) {
  for (DType type : {DType::f32, DType::bf16, DType::f16, DType::f64}) {
    if (a.dtype().equal(numpy_dtype(type))) return type;
  }
  throw py::type_error(std::string(name) + ": expected float32, float64, float16, or uint16 for bfloat16");
}

inline DType math_dtype(const char* name, const array& a) {
  const DType type = float_dtype(name, a);
  if (type != DType::f32 && type != DType::f64)
    throw py::type_error(std::string(name) + ": expected float32 or float64");
  return type;
}

inline DType math_of(DType type) { return type == DType::f64 ? DType::f64 : DType::f32; }

inline Shape shape_of(const char* name, const array& a, py::ssize_t dimensions) {
  require(a.ndim() == dimensions, name, std::to_string(dimensions) + " dimensions");
  return Shape(a.shape(), a.shape() + dimensions);
}

// The data of an argument that must have this dtype and this shape.
inline const void* input(const char* name, const array& a, const py::dtype& dtype, const Shape& shape) {
  if (!a.dtype().equal(dtype)) throw py::type_error(std::string(name) + ": expected " + std::string(py::str(dtype)));
  std::string sizes;
  for (auto size : shape) sizes += (sizes.empty() ? "[" : ", ") + std::to_string(size);
  require(shape_of(name, a, static_cast<py::ssize_t>(shape.size())) == shape, name, "shape " + sizes + "]");
  constexpr int wanted = array::c_style | static_cast<int>(py::detail::npy_api::NPY_ARRAY_ALIGNED_);
  require((a.flags() & wanted) == wanted, name, "a C-contiguous, aligned array");
  return a.size() ? a.data() : nullptr;
}

inline const void* input(const char* name, const Optional& a, const py::dtype& dtype, const Shape& shape) {
  return a ? input(name, *a, dtype, shape) : nullptr;
}

template <class A>
const void* input(const char* name, const A& a, DType type, const Shape& shape) {
  return input(name, a, numpy_dtype(type), shape);
}

template <class A>
const int32_t* integers(const char* name, const A& a, const Shape& shape) {
  return static_cast<const int32_t*>(input(name, a, py::dtype::of<int32_t>(), shape));
}

// A new array, or none, and the pointer that the kernel writes through.
struct Output {
  Optional result;

  Output() = default;
  Output(const py::dtype& dtype, const Shape& shape) : result(array(dtype, shape)) {
    std::memset(result->mutable_data(), 0xff, result->nbytes());
  }
  Output(DType type, const Shape& shape) : Output(numpy_dtype(type), shape) {}

  template <class T = void>
  T* data() {
    return result && result->size() ? static_cast<T*>(result->mutable_data()) : nullptr;
  }
};

inline Output integers(const Shape& shape) { return Output(py::dtype::of<int32_t>(), shape); }

inline Output zeros(DType type, const Shape& shape) {
  Output out(type, shape);
  std::memset(out.result->mutable_data(), 0, out.result->nbytes());
  return out;
}

// A copy, for what a kernel changes in place.
inline Output copy(const char* name, const array& a, const py::dtype& dtype, const Shape& shape) {
  Output out(dtype, shape);
  if (const void* from = input(name, a, dtype, shape)) std::memcpy(out.data(), from, a.nbytes());
  return out;
}

inline Output copy(const char* name, const array& a, DType type, const Shape& shape) {
  return copy(name, a, numpy_dtype(type), shape);
}

}  // namespace widenet

// a b, or initial + a b, on NumPy arrays, by the kernels of csrc/cpu/gemm.cpp.
#include "../cpu/gemm.h"
#include "arrays.h"
#include "numpy_module.h"

namespace widenet {
namespace {

Operand operand(const char* name, const array& a, DType type, bool transposed) {
  const Shape shape = shape_of(name, a, 2);
  const void* data = input(name, a, type, shape);
  return transposed ? Operand{data, 1, shape[1]} : Operand{data, shape[1], 1};
}

// transpose_a: a is [K, M]; transpose_b: b is [N, K]. `initial` [M, N] float is added to.
auto gemm(const array& a, const array& b, const Optional& initial, bool transpose_a, bool transpose_b,
          const std::string& level) {
  const DType type = float_dtype("a", a);
  require(type != DType::f64, "a", "float32, float16, or uint16 for bfloat16");
  const Shape a_shape = shape_of("a", a, 2), b_shape = shape_of("b", b, 2);
  const auto m = a_shape[transpose_a], k = a_shape[!transpose_a], n = b_shape[!transpose_b];
  require(k > 0 && b_shape[transpose_b] == k, "b", "as many rows as a has columns, at least one");
  Output out = initial ? copy("initial", *initial, DType::f32, {m, n}) : Output(type, {m, n});
  const Product product{type,
                        m,
                        n,
                        k,
                        operand("a", a, type, transpose_a),
                        operand("b", b, type, transpose_b),
                        initial ? DType::f32 : type,
                        initial.has_value(),
                        out.data(),
                        n};
  Output workspace(DType::f32, {workspace_size(kernels_of(level), product)});
  if (m && n) multiply(kernels_of(level), product, workspace.data<float>());
  return out.result;
}

}  // namespace

void add_gemm(py::module_& m) {
  using namespace pybind11::literals;
  m.def("gemm", &gemm, "a"_a, "b"_a, py::arg_v("initial", py::none()), "transpose_a"_a = false, "transpose_b"_a = false,
        "level"_a = "");
}

}  // namespace widenet

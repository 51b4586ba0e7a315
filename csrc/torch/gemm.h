// Matrices inside tensors, and their products: by our own kernels (csrc/cpu/gemm.h) where torch's GEMM is slower, else
// by torch.
#pragma once

#include "tensor.h"

namespace widenet {

struct Matrix {
  void* data;
  int64_t rows, columns, row_stride, column_stride;  // in elements
  ScalarType type;

  Matrix transposed() const { return {data, columns, rows, column_stride, row_stride, type}; }
  int64_t element_size() const { return type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2; }
  // Rows first ... first + count - 1.
  Matrix slice(int64_t first, int64_t count) const {
    return {static_cast<char*>(data) + first * row_stride * element_size(),
            count,
            columns,
            row_stride,
            column_stride,
            type};
  }
};

// A tensor [M, N], or expert e of a tensor [E, M, N], in whatever layout it has.
Matrix matrix(const Tensor& t);
Matrix matrix(const Tensor& t, int64_t expert);

// out = a b, or out += a b for fp32. Torch copies an operand only if neither of its strides is 1.
void gemm(const Matrix& out, const Matrix& a, const Matrix& b, bool accumulate = false);
void zero(const Matrix& out);

}  // namespace widenet

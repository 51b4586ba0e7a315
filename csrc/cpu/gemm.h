// Products on the kernels of gemm.cpp and gemm_dots.cpp: by which, what is packed when, and who does which part.
#pragma once

#include "kernels.h"

namespace widenet {

// out [M, N] (+)= a [M, K] b [K, N], K > 0, summed in float; rows of out are out_stride apart, its columns neighbours.
struct Product {
  DType type;  // of a and b: f32, bf16 or f16
  int64_t m, n, k;
  Operand a, b;
  DType out_type;   // f32, or as a and b
  bool accumulate;  // for an f32 out
  void* out;
  int64_t out_stride;
};

// Whether the product is taken as it lies: nothing is packed.
bool by_dots(const Kernels& kernels, const Product& product);

// How many floats multiply() needs to work in.
int64_t workspace_size(const Kernels& kernels, const Product& product);
void multiply(const Kernels& kernels, const Product& product, float* workspace);

}  // namespace widenet

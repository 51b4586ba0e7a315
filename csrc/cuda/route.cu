// What the router's backward needs beside torch's GEMMs: x in the math type, without the tokens that asked for nothing.
//
// d router_weight = grad^T x, where a masked token's x may be NaN, which a gradient of zero does not silence. Reads T
// (D + E) elements, writes T D. One warp a token.
#include "device.h"
#include "kernels.h"

namespace widenet::cuda {
namespace {

template <class T, class A, int kColumns>
__global__ void __launch_bounds__(kThreads) asked_rows_kernel(AskedRowsArgs args, int64_t num_tokens) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kLanes;
  if (token >= num_tokens) return;
  const int lane = threadIdx.x % kLanes;
  const A* grad = static_cast<const A*>(args.grad) + token * args.num_experts;
  bool nonzero = false;
  for (int64_t e = lane; e < args.num_experts; e += kLanes) nonzero |= grad[e] != A{0};
  const bool asked = __ballot_sync(kAllLanes, nonzero);
  const int64_t pieces = args.dim / kColumns;
  const auto* in = static_cast<const Pack<T, kColumns>*>(args.x) + token * pieces;
  auto* out = static_cast<Pack<A, kColumns>*>(args.rows) + token * pieces;
  for (int64_t piece = lane; piece < pieces; piece += kLanes) {
    const Pack<T, kColumns> values = in[piece];
    Pack<A, kColumns> row;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) row.values[i] = asked ? static_cast<A>(widen(values.values[i])) : A{0};
    out[piece] = row;
  }
}

template <class T, class A>
void asked_rows_of(const AskedRowsArgs& args, int64_t num_tokens, cudaStream_t stream) {
  constexpr int kColumns = kWideBytes / sizeof(A);
  const bool wide =
      is_aligned<sizeof(Pack<T, kColumns>)>(args.x) && is_aligned<kWideBytes>(args.rows) && args.dim % kColumns == 0;
  const auto kernel = wide ? asked_rows_kernel<T, A, kColumns> : asked_rows_kernel<T, A, 1>;
  launch("route_backward", kernel, divide_up(num_tokens, kWarps), 0, stream, args, num_tokens);
}

}  // namespace

void asked_rows(const AskedRowsArgs& args, int64_t num_tokens, cudaStream_t stream) {
  dispatch(args.type, [&](auto type) {
    using T = decltype(type);
    args.math == DType::f64 ? asked_rows_of<T, double>(args, num_tokens, stream)
                            : asked_rows_of<T, math_t<T>>(args, num_tokens, stream);
  });
}

}  // namespace widenet::cuda

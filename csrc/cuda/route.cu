// The router's backward. Up to kFewExperts experts: both gradients in one pass over grad and x, which reads T (D + E)
// elements and writes T D; then a sum over the parts of the tokens. More are torch's GEMMs, beside which is needed
// what is here too: x in the math type, without the tokens that asked for nothing.
//
// d router_weight = grad^T x, where a masked token's x may be NaN, which a gradient of zero does not silence.
#include "device.h"
#include "kernels.h"

namespace widenet::cuda {
namespace {

constexpr int64_t kTokensOfPart = 64;
constexpr int kBlocks = 2;  // on a multiprocessor at least, which leaves a thread 128 registers

// A warp has kColumns columns a lane of one part of the tokens: d x of these, and its share of d router_weight.
template <class T, class A, int kExperts, int kColumns>
__global__ void __launch_bounds__(kThreads, kBlocks) route_backward_kernel(RouteBackwardArgs args, A* partial) {
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kLanes;
  const int64_t pieces = args.dim / kColumns, tiles = (pieces + kLanes - 1) / kLanes;
  const int64_t part = warp / tiles, piece = warp % tiles * kLanes + threadIdx.x % kLanes;
  const int64_t begin = part * kTokensOfPart, num_experts = args.num_experts;
  if (begin >= args.num_tokens || piece >= pieces) return;
  const int64_t end = begin + kTokensOfPart < args.num_tokens ? begin + kTokensOfPart : args.num_tokens;
  const auto* x = static_cast<const Pack<T, kColumns>*>(args.x);
  auto* grad_x = static_cast<Pack<T, kColumns>*>(args.grad_x);
  constexpr int kTokensAtATime = kExperts > 4 ? 16 / kExperts : 3;  // that 128 registers hold, on sm_100 too
  A weight[kExperts][kColumns] = {}, total[kExperts][kColumns] = {};
#pragma unroll
  for (int e = 0; e < kExperts; ++e) {
    if (e >= num_experts || !grad_x) continue;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      weight[e][i] = static_cast<const A*>(args.router_weight)[e * args.dim + piece * kColumns + i];
    }
  }
#pragma unroll(kTokensAtATime)
  for (int64_t token = begin; token < end; ++token) {
    A grad[kExperts];
    bool asked = false;
#pragma unroll
    for (int e = 0; e < kExperts; ++e) {
      grad[e] = e < num_experts ? static_cast<const A*>(args.grad)[token * num_experts + e] : A{0};
      asked |= grad[e] != A{0};
    }
    const Pack<T, kColumns> values = partial && asked ? x[token * pieces + piece] : Pack<T, kColumns>{};
    Pack<T, kColumns> out;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const A value = static_cast<A>(widen(values.values[i]));
      A sum = 0;
#pragma unroll
      for (int e = 0; e < kExperts; ++e) {
        total[e][i] += grad[e] * value;
        sum += grad[e] * weight[e][i];
      }
      out.values[i] = narrow<T>(sum);
    }
    if (grad_x) grad_x[token * pieces + piece] = out;
  }
  if (!partial) return;
#pragma unroll
  for (int e = 0; e < kExperts; ++e) {
    if (e >= num_experts) continue;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      partial[(part * num_experts + e) * args.dim + piece * kColumns + i] = total[e][i];
    }
  }
}

// out[i] = the sum of partial[part, i], each warp some of the parts, then over the warps of the block.
template <class A>
__global__ void __launch_bounds__(kThreads)
    sum_parts_kernel(const A* partial, A* out, int64_t num_parts, int64_t size) {
  A* of_warps = shared_memory<A>();
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kLanes + threadIdx.x % kLanes;
  A total = 0;
#pragma unroll 4
  for (int64_t part = threadIdx.x / kLanes; part < num_parts && i < size; part += kWarps) {
    total += partial[part * size + i];
  }
  of_warps[threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.x >= kLanes || i >= size) return;
  for (unsigned warp = 1; warp < kWarps; ++warp) total += of_warps[warp * kLanes + threadIdx.x];
  out[i] = total;
}

// As many columns a lane as 16 bytes hold, or as its registers do: two of A for each expert and column.
template <class T, class A, int kExperts>
void route_backward_of(const RouteBackwardArgs& args, A* partial, cudaStream_t stream) {
  constexpr int kSums = sizeof(A) == sizeof(double) ? 8 : 32, kWide = kWideBytes / sizeof(T);
  constexpr int kColumns = kExperts >= kSums ? 1 : kSums / kExperts < kWide ? kSums / kExperts : kWide;
  const bool wide = is_aligned<sizeof(Pack<T, kColumns>)>(args.x, args.grad_x) && args.dim % kColumns == 0;
  const auto kernel = wide ? route_backward_kernel<T, A, kExperts, kColumns> : route_backward_kernel<T, A, kExperts, 1>;
  const int64_t tiles = divide_up(wide ? args.dim / kColumns : args.dim, kLanes), parts = route_parts(args.num_tokens);
  launch("route_backward", kernel, divide_up(parts * tiles, kWarps), 0, stream, args, partial);
  if (!partial) return;
  const int64_t size = args.num_experts * args.dim;
  launch("route_backward", sum_parts_kernel<A>, divide_up(size, kLanes), kThreads * sizeof(A), stream,
         static_cast<const A*>(partial), static_cast<A*>(args.grad_router_weight), parts, size);
}

template <class T, class A>
void route_backward_of(const RouteBackwardArgs& args, void* partial, cudaStream_t stream) {
  const auto kernel = args.num_experts <= 4   ? route_backward_of<T, A, 4>
                      : args.num_experts <= 8 ? route_backward_of<T, A, 8>
                                              : route_backward_of<T, A, kFewExperts>;
  kernel(args, static_cast<A*>(partial), stream);
}

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

int64_t route_parts(int64_t num_tokens) { return divide_up(num_tokens, kTokensOfPart); }

void route_backward(const RouteBackwardArgs& args, void* partial, cudaStream_t stream) {
  if (args.num_experts > kFewExperts) {
    throw std::invalid_argument("route_backward: expected at most 16 experts, got " + std::to_string(args.num_experts));
  }
  dispatch(args.type, [&](auto type) {
    using T = decltype(type);
    args.math == DType::f64 ? route_backward_of<T, double>(args, partial, stream)
                            : route_backward_of<T, math_t<T>>(args, partial, stream);
  });
}

void asked_rows(const AskedRowsArgs& args, int64_t num_tokens, cudaStream_t stream) {
  dispatch(args.type, [&](auto type) {
    using T = decltype(type);
    args.math == DType::f64 ? asked_rows_of<T, double>(args, num_tokens, stream)
                            : asked_rows_of<T, math_t<T>>(args, num_tokens, stream);
  });
}

}  // namespace widenet::cuda

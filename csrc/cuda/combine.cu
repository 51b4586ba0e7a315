// combine: y[t] = sum over k of weight[t, k] * rows[choice_row[t, k]], in k order, in the math type; and its backward.
//
// Reads K T D and writes T D elements; the backward reads 2 R D and writes R D. One warp a token (a row), 16 bytes of
// neighbouring columns a lane at a time. Dropped choices are skipped, never multiplied by zero.
#include "device.h"
#include "kernels.h"

namespace widenet::cuda {
namespace {

template <class T, class A, int kColumns>
__global__ void __launch_bounds__(kThreads) combine_kernel(CombineArgs args, int64_t num_tokens) {
  using Columns = Pack<T, kColumns>;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kLanes;
  if (token >= num_tokens) return;
  const A* weight = static_cast<const A*>(args.weight);
  const int64_t pieces = args.dim / kColumns;
  for (int64_t piece = threadIdx.x % kLanes; piece < pieces; piece += kLanes) {
    A total[kColumns] = {};
    for (int64_t k = 0; k < args.k; ++k) {
      const int64_t choice = token * args.k + k, row = args.choice_row[choice];
      if (row < 0 || row >= args.num_rows) continue;
      const Columns values = static_cast<const Columns*>(args.rows)[row * pieces + piece];
      const A w = weight ? weight[choice] : A{1};
#pragma unroll
      for (int i = 0; i < kColumns; ++i) total[i] += w * static_cast<A>(widen(values.values[i]));
    }
    Columns out;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) out.values[i] = narrow<T>(total[i]);
    static_cast<Columns*>(args.y)[token * pieces + piece] = out;
  }
}

// The warps after those of the rows: grad_weight is zero for a choice that no row serves.
template <class A>
__device__ void clear_dropped(const CombineBackwardArgs& args, int64_t choice, int64_t num_rows) {
  if (!args.grad_weight || choice >= args.num_tokens * args.k) return;
  const int64_t row = args.choice_row[choice];
  const bool served = row >= 0 && row < num_rows && args.row_choice[row] == choice;
  if (!served) static_cast<A*>(args.grad_weight)[choice] = A{0};
}

template <class T, class A, int kColumns>
__global__ void __launch_bounds__(kThreads) combine_backward_kernel(CombineBackwardArgs args, int64_t num_rows) {
  using Columns = Pack<T, kColumns>;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kLanes;
  if (row >= num_rows) return clear_dropped<A>(args, (row - num_rows) * kLanes + threadIdx.x % kLanes, num_rows);
  const int64_t choice = args.row_choice[row], pieces = args.dim / kColumns;
  const bool used = choice >= 0 && choice < args.num_tokens * args.k;
  const bool owns = args.grad_weight && used && args.choice_row[choice] == row;  // even in a plan that is none
  const A weight = used ? static_cast<const A*>(args.weight)[choice] : A{0};
  const int64_t token = used ? token_of(choice, args.k) : 0;
  A dot = 0;
  for (int64_t piece = threadIdx.x % kLanes; piece < pieces; piece += kLanes) {
    Columns out{};
    if (used) {
      const Columns grad = static_cast<const Columns*>(args.grad)[token * pieces + piece];
      const Columns value = args.grad_weight ? static_cast<const Columns*>(args.rows)[row * pieces + piece] : Columns{};
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        const A g = static_cast<A>(widen(grad.values[i]));
        out.values[i] = narrow<T>(weight * g);
        dot += g * static_cast<A>(widen(value.values[i]));
      }
    }
    if (args.grad_rows) static_cast<Columns*>(args.grad_rows)[row * pieces + piece] = out;
  }
  dot = group_sum<kLanes>(dot);
  if (owns && threadIdx.x % kLanes == 0) static_cast<A*>(args.grad_weight)[choice] = dot;
}

template <class T, class A>
void combine_of(const CombineArgs& args, int64_t num_tokens, cudaStream_t stream) {
  const bool wide = is_aligned<kWideBytes>(args.rows, args.y, args.dim * static_cast<int64_t>(sizeof(T)));
  const auto kernel = wide ? combine_kernel<T, A, kWideBytes / sizeof(T)> : combine_kernel<T, A, 1>;
  launch("combine", kernel, divide_up(num_tokens, kWarps), 0, stream, args, num_tokens);
}

template <class T, class A>
void combine_backward_of(const CombineBackwardArgs& args, int64_t num_rows, cudaStream_t stream) {
  const bool wide =
      is_aligned<kWideBytes>(args.grad, args.rows, args.grad_rows, args.dim * static_cast<int64_t>(sizeof(T)));
  const auto kernel = wide ? combine_backward_kernel<T, A, kWideBytes / sizeof(T)> : combine_backward_kernel<T, A, 1>;
  const int64_t choice_warps = args.grad_weight ? divide_up(args.num_tokens * args.k, kLanes) : 0;
  launch("combine_backward", kernel, divide_up(num_rows + choice_warps, kWarps), 0, stream, args, num_rows);
}

}  // namespace

void combine(const CombineArgs& args, int64_t num_tokens, cudaStream_t stream) {
  if (args.bias) throw std::invalid_argument("combine: a bias is not served on a GPU");
  dispatch(args.type, [&](auto type) {
    using T = decltype(type);
    args.math == DType::f64 ? combine_of<T, double>(args, num_tokens, stream)
                            : combine_of<T, math_t<T>>(args, num_tokens, stream);
  });
}

void combine_backward(const CombineBackwardArgs& args, int64_t num_rows, cudaStream_t stream) {
  dispatch(args.type, [&](auto type) {
    using T = decltype(type);
    args.math == DType::f64 ? combine_backward_of<T, double>(args, num_rows, stream)
                            : combine_backward_of<T, math_t<T>>(args, num_rows, stream);
  });
}

}  // namespace widenet::cuda

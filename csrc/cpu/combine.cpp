// combine: y[t] = sum over k of weight[t, k] * (rows[choice_row[t, k]] + bias), in k order, in the math type.
//
// Dropped choices are skipped, never multiplied by zero. Forward reads K T D and writes T D elements; the backward
// reads (K + 1) T D and writes R D, and every output element has one owner. Without weights the forward is permute's
// backward.
#include "levels.h"
#include "vector.h"

namespace widenet::WIDENET_LEVEL {
namespace {

constexpr int64_t kColumns = 256;  // of D at a time: the sums stay in the first-level cache

// The last expert that begins at or before the row: those before it with the same begin are empty.
int64_t expert_of(int64_t row, const int32_t* expert_begin, int64_t num_experts) {
  int64_t low = 0, high = num_experts;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (expert_begin[middle] <= row ? low : high) = middle;
  }
  return low;
}

template <class T, class A>
void combine_token(const CombineArgs& args, int64_t t) {
  const T* rows = static_cast<const T*>(args.rows);
  const T* bias = static_cast<const T*>(args.bias);
  const A* weight = static_cast<const A*>(args.weight);
  T* y = static_cast<T*>(args.y) + t * args.dim;
  for (int64_t first = 0; first < args.dim; first += kColumns) {
    const int64_t n = first + kColumns < args.dim ? kColumns : args.dim - first;
    A total[kColumns] = {};
    for (int64_t k = 0; k < args.k; ++k) {
      const int64_t row = args.choice_row[t * args.k + k];
      if (row < 0 || row >= args.num_rows) continue;
      const A w = weight ? weight[t * args.k + k] : 1;
      const T* value = rows + row * args.dim + first;
      if (bias) {
        const T* b = bias + expert_of(row, args.expert_begin, args.num_experts) * args.dim + first;
        for (int64_t i = 0; i < n; ++i) {
          total[i] += w * (static_cast<A>(widen(value[i])) + static_cast<A>(widen(b[i])));
        }
      } else {
        for (int64_t i = 0; i < n; ++i) total[i] += w * static_cast<A>(widen(value[i]));
      }
    }
    for (int64_t i = 0; i < n; ++i) y[first + i] = narrow<T>(total[i]);
  }
}

template <class T, class A>
void combine_backward_row(const CombineBackwardArgs& args, int64_t r) {
  T* grad_row = args.grad_rows ? static_cast<T*>(args.grad_rows) + r * args.dim : nullptr;
  const int64_t choice = args.row_choice[r];
  if (choice < 0 || choice >= args.num_tokens * args.k) {
    for (int64_t i = 0; grad_row && i < args.dim; ++i) grad_row[i] = T{};
    return;
  }
  const T* grad = static_cast<const T*>(args.grad) + choice / args.k * args.dim;
  if (grad_row) {
    const A w = static_cast<const A*>(args.weight)[choice];
    for (int64_t i = 0; i < args.dim; ++i) grad_row[i] = narrow<T>(w * static_cast<A>(widen(grad[i])));
  }
  if (args.grad_weight) {
    const T* row = static_cast<const T*>(args.rows) + r * args.dim;
    static_cast<A*>(args.grad_weight)[choice] = dot<A>(grad, row, args.dim);
  }
}

}  // namespace

void combine(const CombineArgs& args, int64_t begin, int64_t end) {
  dispatch(args.type, args.math, [&](auto type, auto math) {
    for (int64_t t = begin; t < end; ++t) combine_token<decltype(type), decltype(math)>(args, t);
  });
}

void combine_backward(const CombineBackwardArgs& args, int64_t begin, int64_t end) {
  dispatch(args.type, args.math, [&](auto type, auto math) {
    for (int64_t r = begin; r < end; ++r) combine_backward_row<decltype(type), decltype(math)>(args, r);
  });
}

}  // namespace widenet::WIDENET_LEVEL

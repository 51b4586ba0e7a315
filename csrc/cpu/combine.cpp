// combine: y[t] = sum over k of weight[t, k] * (rows[choice_row[t, k]] + bias), in k order, in the math type.
//
// Dropped choices are skipped, never multiplied by zero. Forward reads K T D and writes T D elements; the backward
// reads (K + 1) T D and writes R D, and every output element has one owner. Without weights the forward is permute's
// backward.
#include "levels.h"
#include "vector.h"

namespace widenet::WIDENET_LEVEL {
namespace {

constexpr int64_t kVectors = 4;  // of sums at a time: they stay in registers over k

// The last expert that begins at or before the row: those before it with the same begin are empty.
int64_t expert_of(int64_t row, const int32_t* expert_begin, int64_t num_experts) {
  int64_t low = 0, high = num_experts;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (expert_begin[middle] <= row ? low : high) = middle;
  }
  return low;
}

// f(weight, row, bias of the row's expert or null) for what was served of the token, in k order.
template <class T, class A, class F>
void for_each_row(const CombineArgs& args, int64_t t, F&& f) {
  const T *rows = static_cast<const T*>(args.rows), *bias = static_cast<const T*>(args.bias);
  const A* weight = static_cast<const A*>(args.weight);
  for (int64_t choice = t * args.k; choice < (t + 1) * args.k; ++choice) {
    const int64_t row = args.choice_row[choice];
    if (row < 0 || row >= args.num_rows) continue;
    const T* b = bias ? bias + expert_of(row, args.expert_begin, args.num_experts) * args.dim : nullptr;
    f(weight ? weight[choice] : A{1}, rows + row * args.dim, b);
  }
}

template <class T, class A>
void combine_token(const CombineArgs& args, int64_t t) {
  constexpr int64_t lanes = Lanes<A>::size, columns = kVectors * lanes;
  T* y = static_cast<T*>(args.y) + t * args.dim;
  int64_t first = 0;
  for (; first + columns <= args.dim; first += columns) {
    typename Lanes<A>::type total[kVectors] = {};
    for_each_row<T, A>(args, t, [&](A w, const T* row, const T* bias) {
      for (int64_t i = 0; i < kVectors; ++i) {
        auto value = load<A>(row + first + i * lanes);
        if (bias) value += load<A>(bias + first + i * lanes);
        total[i] += w * value;
      }
    });
    A sums[columns];
    std::memcpy(sums, total, sizeof(total));
    for (int64_t i = 0; i < columns; ++i) y[first + i] = narrow<T>(sums[i]);
  }
  for (; first < args.dim; ++first) {
    A total = 0;
    for_each_row<T, A>(args, t, [&](A w, const T* row, const T* bias) {
      const A value = static_cast<A>(widen(row[first]));
      total += w * (bias ? value + static_cast<A>(widen(bias[first])) : value);
    });
    y[first] = narrow<T>(total);
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

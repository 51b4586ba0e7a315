// What stands around the experts' GEMMs: bias and activation behind the first, their gradients, the bias gradients.
//
// The GEMMs themselves are torch's. The forward reads and writes z once and writes act(z); the backward reads z and
// the incoming gradient once and writes grad_z and, for the fused FFN, row_weight * act(z) in the same pass.
#include "activation.h"
#include "levels.h"

namespace widenet::WIDENET_LEVEL {
namespace {

constexpr int64_t kColumns = 256;  // of F at a time: what is between two loops stays in the first-level cache

inline int64_t tile(int64_t first, int64_t width) { return first + kColumns < width ? kColumns : width - first; }

template <class T>
void add_bias(T* __restrict z, const T* __restrict bias, int64_t n) {
  for (int64_t i = 0; i < n; ++i) z[i] = narrow<T>(widen(z[i]) + widen(bias[i]));
}

// value is the other half of a gated z, or null. out may be z: each element is read before it is written.
template <class Act, class T>
void activate(const T* z, const T* value, T* out, int64_t n) {
  if (value) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) out[i] = narrow<T>(Act::both(widen(z[i])).value * widen(value[i]));
  } else {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) out[i] = narrow<T>(Act::both(widen(z[i])).value);
  }
}

template <class T>
void activation_row(const ActivationArgs& args, int64_t r) {
  const bool gated = is_gated(args.act);
  T* z = static_cast<T*>(args.z) + r * args.width * (gated ? 2 : 1);
  T* out = static_cast<T*>(args.out) + r * args.width;
  const T* bias = static_cast<const T*>(args.bias);
  for (int64_t first = 0; first < args.width; first += kColumns) {
    const int64_t n = tile(first, args.width);
    T* value = gated ? z + args.width + first : nullptr;
    if (bias) {
      add_bias(z + first, bias + first, n);
      if (gated) add_bias(value, bias + args.width + first, n);
    }
    dispatch(args.act, [&](auto act) { activate<decltype(act)>(z + first, value, out + first, n); });
  }
}

// The backward of up to kColumns columns of one row; h is the activation's value, d its derivative.
template <class T>
struct BackwardTile {
  using A = math_t<T>;
  A h[kColumns], d[kColumns], g[kColumns], result[kColumns];

  template <class Act>
  void evaluate(const T* z, const T* grad, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      const auto both = Act::both(widen(z[i]));
      h[i] = both.value;
      d[i] = both.derivative;
      g[i] = grad ? widen(grad[i]) : 0;
    }
  }

  // grad_z = w * g * d of the plain activation, or of the gate half (times value), and its column sums.
  void store(A w, const A* factor, T* grad_z, A* sums, int64_t n) {
    if (!grad_z) return;
    for (int64_t i = 0; i < n; ++i) result[i] = w * g[i] * factor[i];
    for (int64_t i = 0; i < n; ++i) grad_z[i] = narrow<T>(result[i]);
    if (sums) {
      for (int64_t i = 0; i < n; ++i) sums[i] += result[i];
    }
  }
};

template <class T>
void activation_backward_row(const ActivationBackwardArgs& args, int64_t r, math_t<T>* sums) {
  using A = math_t<T>;
  const bool gated = is_gated(args.act);
  const int64_t width = args.width, wide = width * (gated ? 2 : 1);
  const T* z = static_cast<const T*>(args.z) + r * wide;
  const T* grad = args.grad ? static_cast<const T*>(args.grad) + r * width : nullptr;
  T* grad_z = args.grad_z ? static_cast<T*>(args.grad_z) + r * wide : nullptr;
  T* scaled = args.scaled ? static_cast<T*>(args.scaled) + r * width : nullptr;
  const A w = args.row_weight ? static_cast<const A*>(args.row_weight)[r] : 1;
  A total = 0;
  BackwardTile<T> t;
  for (int64_t first = 0; first < width; first += kColumns) {
    const int64_t n = tile(first, width);
    dispatch(args.act,
             [&](auto act) { t.template evaluate<decltype(act)>(z + first, grad ? grad + first : nullptr, n); });
    if (gated) {  // h = act(gate) * value: the value half's factor is act(gate), the gate half's act'(gate) * value
      A value[kColumns];
      for (int64_t i = 0; i < n; ++i) value[i] = widen(z[width + first + i]);
      t.store(w, t.h, grad_z ? grad_z + width + first : nullptr, sums ? sums + width + first : nullptr, n);
      for (int64_t i = 0; i < n; ++i) {
        t.d[i] *= value[i];
        t.h[i] *= value[i];
      }
    }
    t.store(w, t.d, grad_z ? grad_z + first : nullptr, sums ? sums + first : nullptr, n);
    if (scaled) {
      for (int64_t i = 0; i < n; ++i) scaled[first + i] = narrow<T>(w * t.h[i]);
    }
    if (args.dot) total += dot<A>(t.g, t.h, n);
  }
  if (args.dot) static_cast<A*>(args.dot)[r] = total;
}

// f(row) for the rows of a chunk.
template <class F>
void for_rows(int64_t chunk, int64_t num_rows, F&& f) {
  const int64_t begin = chunk * kChunkRows;
  const int64_t end = begin + kChunkRows < num_rows ? begin + kChunkRows : num_rows;
  for (int64_t r = begin; r < end; ++r) f(r);
}

// The zeroed column sums of a chunk, or null.
template <class A>
A* clear_sums(void* column_sums, int64_t chunk, int64_t width) {
  if (!column_sums) return nullptr;
  A* sums = static_cast<A*>(column_sums) + chunk * width;
  for (int64_t i = 0; i < width; ++i) sums[i] = 0;
  return sums;
}

template <class O, class A>
void reduce_columns(const ReduceChunksArgs& args, int64_t begin, int64_t end) {
  O* out = static_cast<O*>(args.out);
  for (int64_t first = begin; first < end; first += kColumns) {
    const int64_t n = tile(first, end);
    A total[kColumns] = {};
    for (int64_t chunk = 0; chunk < args.num_chunks; ++chunk) {
      const A* sums = static_cast<const A*>(args.column_sums) + chunk * args.width + first;
      for (int64_t i = 0; i < n; ++i) total[i] += sums[i];
    }
    for (int64_t i = 0; i < n; ++i) {
      out[first + i] = narrow<O>(args.accumulate ? static_cast<A>(widen(out[first + i])) + total[i] : total[i]);
    }
  }
}

}  // namespace

void activation(const ActivationArgs& args, int64_t begin, int64_t end) {
  dispatch(args.type, [&](auto type) {
    using T = decltype(type);
    for (int64_t r = begin; r < end; ++r) {
      if (args.act != Activation::none) {
        activation_row<T>(args, r);
      } else if (args.bias) {
        add_bias(static_cast<T*>(args.z) + r * args.width, static_cast<const T*>(args.bias), args.width);
      }
    }
  });
}

void activation_backward(const ActivationBackwardArgs& args, int64_t begin, int64_t end) {
  dispatch(args.type, [&](auto type) {
    using T = decltype(type);
    const int64_t wide = args.width * (is_gated(args.act) ? 2 : 1);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      math_t<T>* sums = clear_sums<math_t<T>>(args.column_sums, chunk, wide);
      for_rows(chunk, args.num_rows, [&](int64_t r) { activation_backward_row<T>(args, r, sums); });
    }
  });
}

void column_sum(const ColumnSumArgs& args, int64_t begin, int64_t end) {
  dispatch(args.type, [&](auto type) {
    using T = decltype(type);
    using A = math_t<T>;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      A* sums = clear_sums<A>(args.column_sums, chunk, args.width);
      for_rows(chunk, args.num_rows, [&](int64_t r) {
        const T* row = static_cast<const T*>(args.rows) + r * args.width;
        const A w = args.row_weight ? static_cast<const A*>(args.row_weight)[r] : 1;
        for (int64_t i = 0; i < args.width; ++i) sums[i] += w * widen(row[i]);
      });
    }
  });
}

void reduce_chunks(const ReduceChunksArgs& args, int64_t begin, int64_t end) {
  dispatch(args.type, [&](auto out) {
    using O = decltype(out);
    if (args.sums == DType::f64) {
      reduce_columns<O, double>(args, begin, end);
    } else {
      reduce_columns<O, float>(args, begin, end);
    }
  });
}

void weight_gradient(const WeightGradientArgs& args, int64_t begin, int64_t end) {
  dispatch(args.type, [&](auto type) {
    using T = decltype(type);
    using A = math_t<T>;
    for (int64_t r = begin; r < end; ++r) {
      const int64_t choice = args.row_choice[r];
      if (choice < 0 || choice >= args.num_choices) continue;
      A total = static_cast<const A*>(args.dot)[r];
      const T* grad = static_cast<const T*>(args.grad) + r * args.dim;
      if (args.bias) total += dot<A>(grad, static_cast<const T*>(args.bias), args.dim);
      static_cast<A*>(args.grad_weight)[choice] = total;
    }
  });
}

void accumulate(const AccumulateArgs& args, int64_t begin, int64_t end) {
  dispatch(args.type, [&](auto type) {
    const auto* values = static_cast<const decltype(type)*>(args.values);
    for (int64_t i = begin; i < end; ++i) args.sum[i] += static_cast<float>(widen(values[i]));
  });
}

}  // namespace widenet::WIDENET_LEVEL

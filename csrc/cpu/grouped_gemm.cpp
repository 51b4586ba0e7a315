// What stands around the experts' GEMMs: bias and activation behind the first, their gradients, the bias gradients.
//
// The GEMMs themselves are gemm.cpp's or torch's. The forward reads and writes z once and writes act(z); the backward
// reads z and the incoming gradient once and writes grad_z and, for the fused FFN, row_weight * act(z) in the same
// pass.
#include "activation.h"
#include "levels.h"

namespace widenet::WIDENET_LEVEL {
namespace {

constexpr int64_t kColumns = 256;  // of F at a time: what is between two loops stays in the first-level cache

inline int64_t tile(int64_t first, int64_t width) { return first + kColumns < width ? kColumns : width - first; }

// What a missing bias or gradient reads, and what a result that nobody wants overwrites: each loop has one form.
template <class T>
struct Spare {
  T zeros[kColumns];  // negative: adding -0 changes no bit, not even a sign
  T unwanted[kColumns] = {};
  math_t<T> sums[kColumns] = {};

  Spare() {
    for (T& zero : zeros) zero = narrow<T>(-0.0f);
  }
};

// z += bias; wide = z.
template <class T>
void add_bias(T* __restrict z, const T* __restrict bias, math_t<T>* __restrict wide, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const T sum = narrow<T>(widen(z[i]) + widen(bias[i]));
    z[i] = sum;
    wide[i] = widen(sum);
  }
}

template <class T>
void activation_row(const ActivationArgs& args, const Spare<T>& spare, int64_t r) {
  const bool gated = is_gated(args.act);
  const int64_t width = args.width, second = gated ? width : 0;  // where the value half begins, if there is one
  T* z = static_cast<T*>(args.z) + r * (width + second);
  T* out = static_cast<T*>(args.out) + r * width;
  const T* bias = static_cast<const T*>(args.bias);
  math_t<T> gate[kColumns], value[kColumns];
  for (int64_t i = 0; i < width; i += kColumns) {
    const int64_t n = tile(i, width);
    add_bias(z + i, bias ? bias + i : spare.zeros, gate, n);
    if (gated) add_bias(z + second + i, bias ? bias + second + i : spare.zeros, value, n);
    dispatch(args.act, [&](auto act) {
      using Act = decltype(act);
      if (gated) {
        for (int64_t j = 0; j < n; ++j) out[i + j] = narrow<T>(Act::both(gate[j]).value * value[j]);
      } else {
        for (int64_t j = 0; j < n; ++j) out[i + j] = narrow<T>(Act::both(gate[j]).value);
      }
    });
  }
}

// The results of up to kColumns columns of one row of the backward.
template <class T>
struct Results {
  T *grad_z, *grad_value, *scaled;  // of both halves of a gated z
  math_t<T>*sums, *value_sums, *products;
};

// grad_z may be grad: each element is read before it is written.
template <class Act, class T>
void activate_backward(const T* z, const T* grad, math_t<T> w, Results<T> out, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    const auto h = Act::both(widen(z[i]));
    const math_t<T> g = widen(grad[i]), result = w * g * h.derivative;
    out.products[i] = g * h.value;
    out.scaled[i] = narrow<T>(w * h.value);
    out.sums[i] += result;
    out.grad_z[i] = narrow<T>(result);
  }
}

template <class Act, class T>
void activate_gated_backward(const T* gate, const T* value, const T* grad, math_t<T> w, Results<T> out, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    const auto h = Act::both(widen(gate[i]));
    const math_t<T> g = widen(grad[i]), v = widen(value[i]);
    const math_t<T> gate_result = w * g * v * h.derivative, value_result = w * g * h.value;
    out.products[i] = g * v * h.value;
    out.scaled[i] = narrow<T>(w * v * h.value);
    out.sums[i] += gate_result;
    out.value_sums[i] += value_result;
    out.grad_z[i] = narrow<T>(gate_result);
    out.grad_value[i] = narrow<T>(value_result);
  }
}

template <class T>
void activation_backward_row(const ActivationBackwardArgs& args, Spare<T>& spare, int64_t r, math_t<T>* sums) {
  using A = math_t<T>;
  const bool gated = is_gated(args.act);
  const int64_t width = args.width, wide = width * (gated ? 2 : 1);
  const T* z = static_cast<const T*>(args.z) + r * wide;
  const T* grad = args.grad ? static_cast<const T*>(args.grad) + r * width : nullptr;
  T* grad_z = args.grad_z ? static_cast<T*>(args.grad_z) + r * wide : nullptr;
  T* scaled = args.scaled ? static_cast<T*>(args.scaled) + r * width : nullptr;
  const A w = args.row_weight ? static_cast<const A*>(args.row_weight)[r] : 1;
  const auto at = [](auto* p, int64_t offset, auto* otherwise) { return p ? p + offset : otherwise; };
  const int64_t second = wide - width;  // where the value half begins, if there is one
  A products[kColumns], total = 0;
  for (int64_t i = 0; i < width; i += kColumns) {
    const int64_t n = tile(i, width);
    const Results<T> out{at(grad_z, i, spare.unwanted),    at(grad_z, second + i, spare.unwanted),
                         at(scaled, i, spare.unwanted),    at(sums, i, spare.sums),
                         at(sums, second + i, spare.sums), products};
    const T* grad_tile = at(grad, i, spare.zeros);
    dispatch(args.act, [&](auto act) {
      using Act = decltype(act);
      if (gated) {
        activate_gated_backward<Act>(z + i, z + second + i, grad_tile, w, out, n);
      } else {
        activate_backward<Act>(z + i, grad_tile, w, out, n);
      }
    });
    if (args.dot) total += sum<A>(products, n);
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
    const Spare<T> spare;
    for (int64_t r = begin; r < end; ++r) activation_row<T>(args, spare, r);
  });
}

void activation_backward(const ActivationBackwardArgs& args, int64_t begin, int64_t end) {
  dispatch(args.type, [&](auto type) {
    using T = decltype(type);
    const int64_t wide = args.width * (is_gated(args.act) ? 2 : 1);
    Spare<T> spare;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      math_t<T>* sums = clear_sums<math_t<T>>(args.column_sums, chunk, wide);
      for_rows(chunk, args.num_rows, [&](int64_t r) { activation_backward_row<T>(args, spare, r, sums); });
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

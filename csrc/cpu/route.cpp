// route's products with the router weight: logits = x router_weight^T and its two gradients.
//
// E is small, so these are bound by reading x, which happens once, in its own format; every sum is one owner's, in an
// order that the number of threads does not change. Forward: T D reads, 2 T D E FLOPs.
#include "levels.h"
#include "vector.h"

namespace widenet::WIDENET_LEVEL {
namespace {

constexpr int64_t kColumns = 64;  // of D at a time in the backward: the sums stay in cache
constexpr int64_t kTokens = 64;   // are summed apart before they are added: a long sum loses few digits
constexpr int64_t kExperts = 64;  // likewise

// Four experts share each load of x.
template <class T, class A>
void logits_of_token(const T* x, const A* router_weight, int64_t num_experts, int64_t dim, A* logits) {
  constexpr int64_t lanes = Lanes<A>::size;
  const int64_t whole = dim / lanes * lanes;
  int64_t e = 0;
  for (; e + 4 <= num_experts; e += 4) {
    const A* w = router_weight + e * dim;
    A total[4] = {};
    for (int64_t first = 0; first < whole; first += kLongestSum) {
      typename Lanes<A>::type sum0{}, sum1{}, sum2{}, sum3{};
      const int64_t end = first + kLongestSum < whole ? first + kLongestSum : whole;
      for (int64_t i = first; i < end; i += lanes) {
        const auto value = load<A>(x + i);
        sum0 += value * load<A>(w + i);
        sum1 += value * load<A>(w + dim + i);
        sum2 += value * load<A>(w + 2 * dim + i);
        sum3 += value * load<A>(w + 3 * dim + i);
      }
      total[0] += sum<A>(sum0);
      total[1] += sum<A>(sum1);
      total[2] += sum<A>(sum2);
      total[3] += sum<A>(sum3);
    }
    for (int64_t j = 0; j < 4; ++j) {
      for (int64_t i = whole; i < dim; ++i) total[j] += static_cast<A>(widen(x[i])) * w[j * dim + i];
      logits[e + j] = total[j];
    }
  }
  for (; e < num_experts; ++e) logits[e] = dot<A>(x, router_weight + e * dim, dim);
}

template <class T, class A>
void grad_x_of_token(const RouteBackwardArgs& args, int64_t t) {
  const A* grad = static_cast<const A*>(args.grad) + t * args.num_experts;
  const A* router_weight = static_cast<const A*>(args.router_weight);
  T* grad_x = static_cast<T*>(args.grad_x) + t * args.dim;
  for (int64_t first = 0; first < args.dim; first += kColumns) {
    const int64_t n = first + kColumns < args.dim ? kColumns : args.dim - first;
    A total[kColumns] = {};
    for (int64_t begin = 0; begin < args.num_experts; begin += kExperts) {
      const int64_t end = begin + kExperts < args.num_experts ? begin + kExperts : args.num_experts;
      A sums[kColumns] = {};
      for (int64_t e = begin; e < end; ++e) {
        const A* w = router_weight + e * args.dim + first;
        for (int64_t i = 0; i < n; ++i) sums[i] += grad[e] * w[i];
      }
      for (int64_t i = 0; i < n; ++i) total[i] += sums[i];
    }
    for (int64_t i = 0; i < n; ++i) grad_x[first + i] = narrow<T>(total[i]);
  }
}

// Columns [first, first + n) of grad_router_weight.
template <class T, class A>
void grad_router_weight_columns(const RouteBackwardArgs& args, int64_t first, int64_t n) {
  const A* grad = static_cast<const A*>(args.grad);
  const T* x = static_cast<const T*>(args.x) + first;
  A* out = static_cast<A*>(args.grad_router_weight) + first;
  for (int64_t e = 0; e < args.num_experts; ++e) {
    for (int64_t i = 0; i < n; ++i) out[e * args.dim + i] = 0;
  }
  A value[kTokens][kColumns] = {};  // zero behind column n, so that the sums below are of a known number
  for (int64_t begin = 0; begin < args.num_tokens; begin += kTokens) {
    const int64_t tokens = begin + kTokens < args.num_tokens ? kTokens : args.num_tokens - begin;
    for (int64_t t = 0; t < tokens; ++t) {
      const bool asked = any_nonzero(grad + (begin + t) * args.num_experts, args.num_experts);
      for (int64_t i = 0; i < n; ++i) value[t][i] = asked ? static_cast<A>(widen(x[(begin + t) * args.dim + i])) : 0;
    }
    for (int64_t e = 0; e < args.num_experts; ++e) {
      typename Lanes<A>::type sums[kColumns / Lanes<A>::size] = {};
      for (int64_t t = 0; t < tokens; ++t) {
        const A g = grad[(begin + t) * args.num_experts + e];
        for (int64_t i = 0; i < kColumns / Lanes<A>::size; ++i) sums[i] += g * load<A>(value[t] + i * Lanes<A>::size);
      }
      A total[kColumns];
      std::memcpy(total, sums, sizeof(total));
      for (int64_t i = 0; i < n; ++i) out[e * args.dim + i] += total[i];
    }
  }
}

}  // namespace

void route(const RouteArgs& args, int64_t begin, int64_t end) {
  dispatch(args.type, args.math, [&](auto t, auto a) {
    using T = decltype(t);
    using A = decltype(a);
    for (int64_t token = begin; token < end; ++token) {
      logits_of_token(static_cast<const T*>(args.x) + token * args.dim, static_cast<const A*>(args.router_weight),
                      args.num_experts, args.dim, static_cast<A*>(args.logits) + token * args.num_experts);
    }
  });
}

void route_backward_x(const RouteBackwardArgs& args, int64_t begin, int64_t end) {
  dispatch(args.type, args.math, [&](auto t, auto a) {
    for (int64_t token = begin; token < end; ++token) grad_x_of_token<decltype(t), decltype(a)>(args, token);
  });
}

void route_backward_weight(const RouteBackwardArgs& args, int64_t begin, int64_t end) {
  dispatch(args.type, args.math, [&](auto t, auto a) {
    for (int64_t first = begin; first < end; first += kColumns) {
      const int64_t n = first + kColumns < end ? kColumns : end - first;
      grad_router_weight_columns<decltype(t), decltype(a)>(args, first, n);
    }
  });
}

}  // namespace widenet::WIDENET_LEVEL

// topk_gate: logits [T, E] -> weight [T, K], expert_index [T, K], probs [T, E].
//
// p = softmax(logits + noise); the k experts of the largest logits + noise, best first, ties to the lower index, NaN
// below -inf (Xue et al. 2021, arXiv 2107.11817, eq. 2). Reads T E, writes T (E + 2 K) elements; E is small, so tokens
// are taken in blocks whose exponentials are one long vector loop.
#include <limits>

#include "activation.h"
#include "levels.h"

namespace widenet::WIDENET_LEVEL {
namespace {

constexpr int64_t kBlockTokens = 64;

// Integers in the order in which z ranks.
inline int32_t ranking_key(float z) {
  const int32_t bits = std::bit_cast<int32_t>(z + 0.0f);  // -0 + 0 is +0
  return z != z ? std::numeric_limits<int32_t>::min() : bits ^ ((bits >> 31) & 0x7fffffff);
}
inline int64_t ranking_key(double z) {
  const int64_t bits = std::bit_cast<int64_t>(z + 0.0);
  return z != z ? std::numeric_limits<int64_t>::min() : bits ^ ((bits >> 63) & 0x7fffffffffffffff);
}

// The k largest of z, best first, by insertion into a sorted list.
template <class A>
void select(const A* z, int64_t num_experts, int64_t k, int32_t* index) {
  int64_t found = 0;
  for (int64_t e = 0; e < num_experts; ++e) {
    const auto key = ranking_key(z[e]);
    if (found == k && key <= ranking_key(z[index[k - 1]])) continue;
    int64_t place = found < k ? found++ : k - 1;
    for (; place > 0 && ranking_key(z[index[place - 1]]) < key; --place) index[place] = index[place - 1];
    index[place] = static_cast<int32_t>(e);
  }
}

// z into probs, its k largest into index, z - max(z) into probs.
template <class T, class A>
void rank_token(const GateArgs& args, int64_t t, int32_t* index, A* probs) {
  const int64_t num_experts = args.num_experts;
  const T* logits = static_cast<const T*>(args.logits) + t * num_experts;
  const A* noise = args.noise ? static_cast<const A*>(args.noise) + t * num_experts : nullptr;
  for (int64_t e = 0; e < num_experts; ++e) probs[e] = static_cast<A>(widen(logits[e]));
  if (noise) {
    for (int64_t e = 0; e < num_experts; ++e) probs[e] += noise[e];
  }
  select(probs, num_experts, args.k, index);
  const A best = probs[index[0]];  // NaN only if all are, and then so are the probs
  for (int64_t e = 0; e < num_experts; ++e) probs[e] -= best;
}

template <class A>
void weigh_token(const GateArgs& args, int64_t t, const A* probs, int32_t* index, A* weight) {
  const bool masked = args.mask && !args.mask[t];
  A kept = 0;
  for (int64_t k = 0; k < args.k; ++k) kept += probs[index[k]];
  for (int64_t k = 0; k < args.k; ++k) {
    weight[k] = masked ? 0 : args.normalize ? probs[index[k]] / kept : probs[index[k]];
  }
  if (masked) {
    for (int64_t k = 0; k < args.k; ++k) index[k] = -1;
  }
}

template <class T, class A>
void gate_tokens(const GateArgs& args, int64_t begin, int64_t end) {
  const int64_t num_experts = args.num_experts;
  for (int64_t first = begin; first < end; first += kBlockTokens) {
    const int64_t last = first + kBlockTokens < end ? first + kBlockTokens : end;
    A* probs = static_cast<A*>(args.probs) + first * num_experts;
    int32_t* index = args.expert_index + first * args.k;
    for (int64_t t = first; t < last; ++t) {
      rank_token<T, A>(args, t, index + (t - first) * args.k, probs + (t - first) * num_experts);
    }
    for (int64_t i = 0; i < (last - first) * num_experts; ++i) probs[i] = exp_negative(probs[i]);
    for (int64_t t = first; t < last; ++t, probs += num_experts, index += args.k) {
      const A total = sum(probs, num_experts);
      for (int64_t e = 0; e < num_experts; ++e) probs[e] /= total;
      weigh_token(args, t, probs, index, static_cast<A*>(args.weight) + t * args.k);
    }
  }
}

template <class A>
void gate_backward_token(const GateBackwardArgs& args, int64_t t) {
  const int64_t num_experts = args.num_experts;
  const int32_t* index = args.expert_index + t * args.k;
  const A* probs = static_cast<const A*>(args.probs) + t * num_experts;
  const A* grad_probs = args.grad_probs ? static_cast<const A*>(args.grad_probs) + t * num_experts : nullptr;
  A* grad = static_cast<A*>(args.grad) + t * num_experts;
  for (int64_t e = 0; e < num_experts; ++e) grad[e] = grad_probs ? grad_probs[e] : 0;
  if (args.grad_weight) {
    const A* grad_weight = static_cast<const A*>(args.grad_weight) + t * args.k;
    const A* weight = static_cast<const A*>(args.weight) + t * args.k;
    const auto chosen = [&](int64_t k) { return index[k] >= 0 && index[k] < num_experts; };
    A shared = 0, kept = 1;  // normalized: w = p / kept, so d p = (d w - sum of d w * w) / kept
    if (args.normalize) {
      kept = 0;
      for (int64_t k = 0; k < args.k; ++k) {
        if (!chosen(k)) continue;
        kept += probs[index[k]];
        shared += grad_weight[k] * weight[k];
      }
    }
    for (int64_t k = 0; k < args.k; ++k) {
      if (chosen(k)) grad[index[k]] += (grad_weight[k] - shared) / kept;
    }
  }
  if (any_nonzero(grad, num_experts)) {  // else zero it stays, even if a masked token's probs are NaN
    const A mean = dot<A>(grad, probs, num_experts);
    for (int64_t e = 0; e < num_experts; ++e) grad[e] = probs[e] * (grad[e] - mean);
  }
  if (args.grad_logits) {
    const A* grad_logits = static_cast<const A*>(args.grad_logits) + t * num_experts;
    for (int64_t e = 0; e < num_experts; ++e) grad[e] += grad_logits[e];
  }
}

}  // namespace

void gate(const GateArgs& args, int64_t begin, int64_t end) {
  dispatch(args.type, [&](auto t) { gate_tokens<decltype(t), math_t<decltype(t)>>(args, begin, end); });
}

void gate_backward(const GateBackwardArgs& args, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    args.type == DType::f64 ? gate_backward_token<double>(args, t) : gate_backward_token<float>(args, t);
  }
}

}  // namespace widenet::WIDENET_LEVEL

// topk_gate: logits [T, E] -> weight [T, K], expert_index [T, K], probs [T, E], and its backward.
//
// p = softmax(logits + noise); the k experts of the largest logits + noise, best first, ties to the lower index, NaN
// below -inf (Xue et al. 2021, arXiv 2107.11817, eq. 2). Reads T E, writes T (E + 2 K) elements, each once. A token is
// shared by up to 32 neighbouring lanes, of which each keeps up to 32 experts in registers.
#include <limits>

#include "device.h"
#include "kernels.h"

namespace widenet::cuda {
namespace {

// Integers in the order in which z ranks, and back. The lowest integer stands for no expert.
__device__ inline int32_t flip(int32_t bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }
__device__ inline int64_t flip(int64_t bits) { return bits ^ ((bits >> 63) & 0x7fffffffffffffff); }

template <class To, class From>
__device__ To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  union {
    From from;
    To to;
  } both{from};
  return both.to;
}

template <class A>
using key_t = std::conditional_t<std::is_same_v<A, double>, int64_t, int32_t>;
template <class A>
constexpr key_t<A> kNoExpert = std::numeric_limits<key_t<A>>::min();

template <class A>
__device__ key_t<A> ranking_key(A z) {
  return z != z ? kNoExpert<A> + 1 : flip(bits_as<key_t<A>>(z + A{0}));  // -0 + 0 is +0
}
template <class A>
__device__ A ranked_value(key_t<A> key) {
  return bits_as<A>(flip(key));
}

constexpr int kBlocks = 2;  // on a multiprocessor at least, which leaves a thread 128 registers

// How lanes, tokens and experts meet: kLanesOfToken lanes share a token, and neighbours hold neighbouring experts.
template <int kLanesOfToken>
struct Place {
  int64_t token;
  bool inside;
  int lane;

  __device__ explicit Place(int64_t num_tokens)
      : token((static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kLanesOfToken),
        inside(token < num_tokens),
        lane(threadIdx.x % kLanesOfToken) {}

  __device__ int expert(int i) const { return i * kLanesOfToken + lane; }
  // The i of an expert, -1 in the lanes that do not hold it.
  __device__ int place(int expert) const { return expert % kLanesOfToken == lane ? expert / kLanesOfToken : -1; }
};

// Of a row of E, 0 beyond its end.
template <class A, class T>
__device__ A load(const T* row, int expert, int num_experts) {
  return expert < num_experts ? static_cast<A>(widen(row[expert])) : A{0};
}

// The best expert that is left among the token's lanes, and its key.
template <int kExperts, int kLanesOfToken, class K>
__device__ void best_of(const K* key, const Place<kLanesOfToken>& at, K& best, int& expert) {
  int mine = 0;
  best = key[0];
#pragma unroll
  for (int i = 1; i < kExperts; ++i) {
    if (key[i] > best) best = key[i], mine = i;
  }
  expert = at.expert(mine);
#pragma unroll
  for (int distance = kLanesOfToken / 2; distance; distance /= 2) {
    const K other = __shfl_xor_sync(kAllLanes, best, distance);
    const int other_expert = __shfl_xor_sync(kAllLanes, expert, distance);
    if (other > best || (other == best && other_expert < expert)) best = other, expert = other_expert;
  }
}

// The keys alone are kept, from which z comes back: twice as many registers would not be there.
template <class T, class A, int kLanesOfToken, int kExperts>
__global__ void __launch_bounds__(kThreads, kBlocks) gate_kernel(GateArgs args, int64_t num_tokens) {
  const Place<kLanesOfToken> at(num_tokens);
  const int num_experts = static_cast<int>(args.num_experts), k = static_cast<int>(args.k);
  const int64_t offset = (at.inside ? at.token : 0) * num_experts;
  key_t<A> key[kExperts], best;
#pragma unroll
  for (int i = 0; i < kExperts; ++i) {
    A z = load<A>(static_cast<const T*>(args.logits) + offset, at.expert(i), num_experts);
    if (args.noise) z += load<A>(static_cast<const A*>(args.noise) + offset, at.expert(i), num_experts);
    key[i] = at.expert(i) < num_experts ? ranking_key(z) : kNoExpert<A>;
  }
  int expert;
  best_of<kExperts>(key, at, best, expert);
  const A highest = ranked_value<A>(best);  // NaN only if all are, and then so are the probs
  A total = 0;
#pragma unroll
  for (int i = 0; i < kExperts; ++i) {
    if (at.expert(i) < num_experts) total += exp(ranked_value<A>(key[i]) - highest);
  }
  total = group_sum<kLanesOfToken>(total);
  A* probs = static_cast<A*>(args.probs) + offset;
#pragma unroll
  for (int i = 0; i < kExperts; ++i) {
    if (at.inside && at.expert(i) < num_experts) probs[at.expert(i)] = exp(ranked_value<A>(key[i]) - highest) / total;
  }

  const bool writes = at.inside && at.lane == 0, masked = writes && args.mask && !args.mask[at.token];
  A* weight = static_cast<A*>(args.weight) + at.token * k;
  int32_t* index = args.expert_index + at.token * k;
  A kept = 0;
  for (int choice = 0; choice < k; ++choice) {
    best_of<kExperts>(key, at, best, expert);
    const int taken = at.place(expert);
#pragma unroll
    for (int i = 0; i < kExperts; ++i) {
      if (i == taken) key[i] = kNoExpert<A>;
    }
    const A prob = exp(ranked_value<A>(best) - highest) / total;  // the bits that probs has
    kept += prob;
    if (writes) weight[choice] = masked ? A{0} : prob;
    if (writes) index[choice] = masked ? -1 : expert;
  }
  for (int choice = 0; writes && args.normalize && !masked && choice < k; ++choice) weight[choice] /= kept;
}

template <class A, int kLanesOfToken, int kExperts>
__global__ void __launch_bounds__(kThreads, kBlocks) gate_backward_kernel(GateBackwardArgs args, int64_t num_tokens) {
  const Place<kLanesOfToken> at(num_tokens);
  const int num_experts = static_cast<int>(args.num_experts), k = static_cast<int>(args.k);
  const int64_t token = at.inside ? at.token : 0, offset = token * num_experts;
  const A* probs = static_cast<const A*>(args.probs) + offset;
  A grad[kExperts];
#pragma unroll
  for (int i = 0; i < kExperts; ++i) {
    grad[i] =
        args.grad_probs ? load<A>(static_cast<const A*>(args.grad_probs) + offset, at.expert(i), num_experts) : A{0};
  }
  if (args.grad_weight) {
    const A* grad_weight = static_cast<const A*>(args.grad_weight) + token * k;
    const A* weight = static_cast<const A*>(args.weight) + token * k;
    const int32_t* index = args.expert_index + token * k;
    A shared = 0, kept = args.normalize ? 0 : 1;  // normalized: w = p / kept, so d p = (d w - sum of d w * w) / kept
    for (int choice = 0; args.normalize && choice < k; ++choice) {
      const int expert = index[choice];
      if (expert < 0 || expert >= num_experts) continue;
      kept += probs[expert];
      shared += grad_weight[choice] * weight[choice];
    }
    for (int choice = 0; choice < k; ++choice) {
      const int expert = index[choice];
      if (expert < 0 || expert >= num_experts) continue;
      const A share = (grad_weight[choice] - shared) / kept;
      const int chosen = at.place(expert);
#pragma unroll
      for (int i = 0; i < kExperts; ++i) grad[i] += i == chosen ? share : A{0};
    }
  }
  A mean = 0;
  int asked = 0;  // else zero it stays, even if a masked token's probs are NaN
#pragma unroll
  for (int i = 0; i < kExperts; ++i) {
    asked += grad[i] != A{0};
    mean += grad[i] * load<A>(probs, at.expert(i), num_experts);
  }
  asked = group_sum<kLanesOfToken>(asked);
  mean = group_sum<kLanesOfToken>(mean);
  const A* more = static_cast<const A*>(args.grad_logits) + (args.grad_logits ? offset : 0);
#pragma unroll
  for (int i = 0; i < kExperts; ++i) {
    A out = asked ? load<A>(probs, at.expert(i), num_experts) * (grad[i] - mean) : A{0};
    if (args.grad_logits) out += load<A>(more, at.expert(i), num_experts);
    if (at.inside && at.expert(i) < num_experts) (static_cast<A*>(args.grad) + offset)[at.expert(i)] = out;
  }
}

// f(lanes, experts): how a token of this many experts is shared out, as compile-time constants.
template <int kLanesOfToken = 1, int kExperts = 1, class F>
void share_out(int64_t num_experts, F&& f) {
  if (kLanesOfToken * kExperts >= num_experts) {
    f(std::integral_constant<int, kLanesOfToken>{}, std::integral_constant<int, kExperts>{});
  } else if constexpr (kExperts < 8) {
    share_out<kLanesOfToken, 2 * kExperts>(num_experts, f);
  } else if constexpr (kLanesOfToken < static_cast<int>(kLanes)) {
    share_out<2 * kLanesOfToken, kExperts>(num_experts, f);
  } else if constexpr (kLanesOfToken * kExperts < kMostExperts) {
    share_out<kLanesOfToken, 2 * kExperts>(num_experts, f);
  } else {
    throw std::invalid_argument("topk_gate: expected at most 1,024 experts, got " + std::to_string(num_experts));
  }
}

}  // namespace

void gate(const GateArgs& args, int64_t num_tokens, cudaStream_t stream) {
  dispatch(args.type, [&](auto type) {
    using T = decltype(type);
    share_out(args.num_experts, [&](auto lanes, auto experts) {
      launch("topk_gate", gate_kernel<T, math_t<T>, lanes(), experts()>, divide_up(num_tokens * lanes(), kThreads), 0,
             stream, args, num_tokens);
    });
  });
}

void gate_backward(const GateBackwardArgs& args, int64_t num_tokens, cudaStream_t stream) {
  share_out(args.num_experts, [&](auto lanes, auto experts) {
    const auto kernel = args.type == DType::f64 ? gate_backward_kernel<double, lanes(), experts()>
                                                : gate_backward_kernel<float, lanes(), experts()>;
    launch("topk_gate_backward", kernel, divide_up(num_tokens * lanes(), kThreads), 0, stream, args, num_tokens);
  });
}

}  // namespace widenet::cuda

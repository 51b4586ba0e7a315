#include "../cpu/parallel.h"
#include "stages.h"

namespace widenet {
namespace {

constexpr int64_t kGrainTokens = 64;
constexpr int64_t kGrainColumns = 64;

using Routed = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Routed route(Tensor x_in, Tensor router_weight_in, int64_t k, std::optional<int64_t> capacity, OptionalTensor noise,
             bool normalize, std::string priority, OptionalTensor mask) {
  const Tensor x = to_contiguous(x_in);
  const ScalarType math = math_type(x, router_weight_in);
  const Tensor router_weight = to_contiguous(router_weight_in, math);
  const int64_t num_experts = router_weight.size(0);
  const Tensor logits = empty_tensor(x, {x.size(0), num_experts}, math);
  const RouteArgs args{dtype_of(x), dtype_of(math),           data(x), data(router_weight), num_experts,
                       x.size(1),   logits.mutable_data_ptr()};
  parallel_for(x.size(0), kGrainTokens, [&](int64_t begin, int64_t end) { kernels().route(args, begin, end); });

  const Gate gate = gate_tokens(logits, noise, mask, k, normalize);
  OptionalTensor score;
  if (priority == "score") score = torch::stable::select(gate.weight, 1, 0);
  const Plan plan = plan_tokens(gate.expert_index, num_experts, capacity, priority, score);
  return std::tuple_cat(std::make_tuple(gate.weight, gate.expert_index, gate.probs, logits), plan);
}

std::tuple<Tensor, Tensor> route_backward(OptionalTensor grad_weight, OptionalTensor grad_probs,
                                          OptionalTensor grad_logits, Tensor x_in, Tensor router_weight_in,
                                          Tensor weight, Tensor expert_index, Tensor probs, bool normalize, bool need_x,
                                          bool need_router_weight) {
  const Tensor x = to_contiguous(x_in);
  const ScalarType math = math_type(x, router_weight_in);
  const Tensor router_weight = to_contiguous(router_weight_in, math);
  const Tensor grad = gate_gradient({grad_weight, grad_probs, grad_logits}, {weight, expert_index, probs}, normalize);
  const int64_t num_tokens = x.size(0), num_experts = router_weight.size(0), dim = x.size(1);
  Tensor grad_x = need_x ? empty_tensor(x, {num_tokens, dim}) : nothing(x);
  Tensor grad_router_weight =
      need_router_weight ? empty_tensor(router_weight, {num_experts, dim}) : nothing(router_weight);
  const RouteBackwardArgs args{dtype_of(x),
                               dtype_of(math),
                               data(grad),
                               data(x),
                               data(router_weight),
                               num_tokens,
                               num_experts,
                               dim,
                               grad_x.mutable_data_ptr(),
                               grad_router_weight.mutable_data_ptr()};
  if (need_x) {
    parallel_for(num_tokens, kGrainTokens,
                 [&](int64_t begin, int64_t end) { kernels().route_backward_x(args, begin, end); });
  }
  if (need_router_weight) {
    parallel_for(dim, kGrainColumns,
                 [&](int64_t begin, int64_t end) { kernels().route_backward_weight(args, begin, end); });
  }
  return {grad_x, to_contiguous(grad_router_weight, router_weight_in.scalar_type())};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(widenet_kernels, CPU, m) {
  m.impl("route", TORCH_BOX(&route));
  m.impl("route_backward", TORCH_BOX(&route_backward));
}

}  // namespace widenet

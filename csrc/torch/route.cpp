#include "device.h"
#include "stages.h"

namespace widenet {
namespace {

constexpr int64_t kGrainTokens = 64;
constexpr int64_t kGrainColumns = 64;

using Routed = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Torch's GEMM, as the out= form: autocast leaves that one alone. 16-bit operands may have an fp32 result.
void mm_out(const char* op, const Tensor& out, const Tensor& a, const Tensor& b) {
  using torch::stable::detail::from;
  const bool same = out.scalar_type() == a.scalar_type();
  std::vector<StableIValue> stack{from(a), from(b)};
  if (!same) stack.push_back(from(out.scalar_type()));
  stack.push_back(from(out));
  call_torch(op, "aten::mm", same ? "out" : "dtype_out", stack.data());
  torch::stable::detail::to<Tensor>(stack[0]);  // out again, which is owned here now
}

Tensor transposed(const Tensor& t) { return torch::stable::transpose(t, 0, 1); }

// On a GPU the tensor cores multiply 16-bit x and router_weight: such products are exact in fp32, where they are
// summed.
void find_logits(const Tensor& x, const Tensor& router_weight_in, const Tensor& logits) {
  const ScalarType math = logits.scalar_type();
  if (on_gpu(x)) {
    const bool as_they_are = x.scalar_type() == router_weight_in.scalar_type();
    const ScalarType dtype = as_they_are ? x.scalar_type() : math;
    return mm_out("route", logits, to_contiguous(x, dtype), transposed(to_contiguous(router_weight_in, dtype)));
  }
  const Tensor router_weight = to_contiguous(router_weight_in, math);
  const RouteArgs args{
      dtype_of(x),           dtype_of(logits),         data(x), data(router_weight), router_weight.size(0),
      router_weight.size(1), logits.mutable_data_ptr()};
  parallel_for(x.size(0), kGrainTokens, [&](int64_t begin, int64_t end) { kernels().route(args, begin, end); });
}

Routed route(Tensor x_in, Tensor router_weight, int64_t k, std::optional<int64_t> capacity, OptionalTensor noise,
             bool normalize, std::string priority, OptionalTensor mask) {
  const Tensor x = to_contiguous(x_in);
  const int64_t num_experts = router_weight.size(0);
  const Tensor logits = empty_tensor(x, {x.size(0), num_experts}, math_type(x, router_weight));
  find_logits(x, router_weight, logits);
  const Gate gate = gate_tokens(logits, noise, mask, k, normalize);
  OptionalTensor score;
  if (priority == "score") score = torch::stable::select(gate.weight, 1, 0);
  const Plan plan = plan_tokens(gate.expert_index, num_experts, capacity, priority, score);
  return std::tuple_cat(std::make_tuple(gate.weight, gate.expert_index, gate.probs, logits), plan);
}

// Both gradients are written where they have elements.
struct RouteGradients {
  Tensor x, router_weight;
};

RouteBackwardArgs arguments(const Tensor& grad, const Tensor& x, const Tensor& router_weight,
                            const RouteGradients& out) {
  return {dtype_of(x),
          dtype_of(grad),
          data(grad),
          data(x),
          data(router_weight),
          x.size(0),
          router_weight.size(0),
          x.size(1),
          out.x.numel() ? out.x.mutable_data_ptr() : nullptr,
          out.router_weight.mutable_data_ptr()};
}

void route_backward_on_cpu(const RouteBackwardArgs& args, const RouteGradients& out) {
  if (out.x.numel()) {
    parallel_for(args.num_tokens, kGrainTokens,
                 [&](int64_t begin, int64_t end) { kernels().route_backward_x(args, begin, end); });
  }
  if (out.router_weight.numel()) {
    parallel_for(args.dim, kGrainColumns,
                 [&](int64_t begin, int64_t end) { kernels().route_backward_weight(args, begin, end); });
  }
}

// In one pass, for few experts.
void route_backward_fused(const RouteBackwardArgs& args, const Tensor& grad, const RouteGradients& out) {
  const bool wanted = out.router_weight.numel();
  const int64_t parts = wanted ? cuda::route_parts(args.num_tokens) : 0;
  const Tensor partial = empty_tensor(grad, {parts, args.num_experts, args.dim});
  void* room = wanted ? partial.mutable_data_ptr() : nullptr;
  on_stream(grad, [&](cudaStream_t stream) { cuda::route_backward(args, room, stream); });
}

// By torch's GEMMs, for many.
void route_backward_by_gemms(const Tensor& grad, const Tensor& x, const Tensor& router_weight, RouteGradients& out) {
  const ScalarType math = grad.scalar_type();
  if (out.x.numel()) {
    const bool same = x.scalar_type() == math;
    const Tensor grad_x = same ? out.x : empty_tensor(grad, {x.size(0), x.size(1)});
    mm_out("route_backward", grad_x, grad, router_weight);
    if (!same) torch::stable::copy_(out.x, grad_x);
  }
  if (out.router_weight.numel()) {
    const Tensor asked = empty_tensor(grad, {x.size(0), x.size(1)});
    const cuda::AskedRowsArgs args{dtype_of(x), dtype_of(math),          data(grad), data(x), grad.size(1),
                                   x.size(1),   asked.mutable_data_ptr()};
    on_stream(x, [&](cudaStream_t stream) { cuda::asked_rows(args, x.size(0), stream); });
    mm_out("route_backward", out.router_weight, transposed(grad), asked);
  }
}

std::tuple<Tensor, Tensor> route_backward(OptionalTensor grad_weight, OptionalTensor grad_probs,
                                          OptionalTensor grad_logits, Tensor x_in, Tensor router_weight_in,
                                          Tensor weight, Tensor expert_index, Tensor probs, bool normalize, bool need_x,
                                          bool need_router_weight) {
  const Tensor x = to_contiguous(x_in), router_weight = to_contiguous(router_weight_in, probs.scalar_type());
  const Tensor grad = gate_gradient({grad_weight, grad_probs, grad_logits}, {weight, expert_index, probs}, normalize);
  RouteGradients out{
      need_x ? empty_tensor(x, {x.size(0), x.size(1)}) : nothing(x),
      need_router_weight ? empty_tensor(router_weight, {router_weight.size(0), x.size(1)}) : nothing(router_weight)};
  const RouteBackwardArgs args = arguments(grad, x, router_weight, out);
  if (!on_gpu(x)) {
    route_backward_on_cpu(args, out);
  } else if (args.num_experts <= cuda::kFewExperts && args.num_tokens) {
    route_backward_fused(args, grad, out);
  } else {
    route_backward_by_gemms(grad, x, router_weight, out);
  }
  return {out.x, to_contiguous(out.router_weight, router_weight_in.scalar_type())};
}

}  // namespace

WIDENET_OPS(m) {
  m.impl("route", TORCH_BOX(&route));
  m.impl("route_backward", TORCH_BOX(&route_backward));
}

}  // namespace widenet

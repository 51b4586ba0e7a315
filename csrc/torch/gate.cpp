#include "device.h"
#include "stages.h"

namespace widenet {
namespace {

constexpr int64_t kGrainTokens = 256;

std::tuple<Tensor, Tensor, Tensor> topk_gate(Tensor logits, int64_t k, OptionalTensor noise, bool normalize) {
  const Gate gate = gate_tokens(logits, noise, std::nullopt, k, normalize);
  return {gate.weight, gate.expert_index, gate.probs};
}

Tensor topk_gate_backward(OptionalTensor grad_weight, OptionalTensor grad_probs, Tensor weight, Tensor expert_index,
                          Tensor probs, bool normalize) {
  return gate_gradient({grad_weight, grad_probs, std::nullopt}, {weight, expert_index, probs}, normalize);
}

}  // namespace

Gate gate_tokens(const Tensor& logits_in, const OptionalTensor& noise_in, const OptionalTensor& mask_in, int64_t k,
                 bool normalize) {
  const Tensor logits = to_contiguous(logits_in);
  const OptionalTensor noise = to_contiguous(noise_in, math_type(logits)), mask = to_contiguous(mask_in);
  const int64_t num_tokens = logits.size(0), num_experts = logits.size(1);
  const Gate gate{empty_tensor(logits, {num_tokens, k}, math_type(logits)),
                  empty_tensor(logits, {num_tokens, k}, ScalarType::Int),
                  empty_tensor(logits, {num_tokens, num_experts}, math_type(logits))};
  const GateArgs args{dtype_of(logits),
                      data(logits),
                      data(noise),
                      static_cast<const bool*>(data(mask)),
                      num_experts,
                      k,
                      normalize,
                      gate.weight.mutable_data_ptr(),
                      static_cast<int32_t*>(gate.expert_index.mutable_data_ptr()),
                      gate.probs.mutable_data_ptr()};
  run(logits, kernels().gate, cuda::gate, args, num_tokens, kGrainTokens);
  return gate;
}

Tensor gate_gradient(const GateGradients& grads, const Gate& gate, bool normalize) {
  const OptionalTensor grad_weight = to_contiguous(grads.weight), grad_probs = to_contiguous(grads.probs),
                       grad_logits = to_contiguous(grads.logits);
  const Tensor weight = to_contiguous(gate.weight), index = to_contiguous(gate.expert_index),
               probs = to_contiguous(gate.probs);
  const Tensor grad = empty_tensor(probs, {probs.size(0), probs.size(1)});
  const GateBackwardArgs args{
      dtype_of(probs), data(grad_weight), data(grad_probs), data(grad_logits), data(weight),           integers(index),
      data(probs),     probs.size(1),     index.size(1),    normalize,         grad.mutable_data_ptr()};
  run(probs, kernels().gate_backward, cuda::gate_backward, args, probs.size(0), kGrainTokens);
  return grad;
}

WIDENET_OPS(m) {
  m.impl("topk_gate", TORCH_BOX(&topk_gate));
  m.impl("topk_gate_backward", TORCH_BOX(&topk_gate_backward));
}

}  // namespace widenet

#include <array>

#include "device.h"
#include "stages.h"

namespace widenet {
namespace {

Priority priority_of(const std::string& name) {
  if (name == "token") return Priority::token;
  if (name == "score") return Priority::score;
  STD_TORCH_CHECK(name == "choice", "plan_routing: priority: expected 'choice', 'token' or 'score', got ", name);
  return Priority::choice;
}

int32_t* output(const Tensor& t) { return static_cast<int32_t*>(t.mutable_data_ptr()); }

// The tokens as a score takes them, the highest first: ascending order puts NaN last, and the sort is stable.
Tensor order_of(const Tensor& score) {
  std::array<StableIValue, 1> negated{torch::stable::detail::from(score)};
  call_torch("plan_routing", "aten::neg", "", negated.data());
  std::array<StableIValue, 4> sorted{negated[0], torch::stable::detail::from(true),
                                     torch::stable::detail::from(int64_t{0}), torch::stable::detail::from(false)};
  call_torch("plan_routing", "aten::argsort", "stable", sorted.data());
  return torch::stable::detail::to<Tensor>(sorted[0]);
}

void plan_on_gpu(const PlanArgs& args, const Tensor& index, const OptionalTensor& score) {
  const OptionalTensor order = score ? OptionalTensor(order_of(*score)) : std::nullopt;
  const int64_t parts = cuda::plan_parts(args.num_tokens * args.k);
  const Tensor part_demand = empty_tensor(index, {parts * args.num_experts}, ScalarType::Int);
  on_stream(index, [&](cudaStream_t stream) {
    cuda::plan_routing(args, static_cast<const int64_t*>(data(order)), output(part_demand), stream);
  });
}

}  // namespace

Plan plan_tokens(Tensor expert_index, int64_t num_experts, std::optional<int64_t> capacity, std::string priority,
                 OptionalTensor score_in) {
  const Tensor index = to_contiguous(expert_index);
  const bool narrow = index.scalar_type() == ScalarType::Int;
  const int64_t num_tokens = index.size(0), k = index.size(1);
  const int64_t num_rows = capacity ? num_experts * *capacity : num_tokens * k;
  const auto integers = [&](const Sizes& sizes) { return empty_tensor(index, sizes, ScalarType::Int); };
  const Plan plan{integers({num_tokens, k}), integers({num_rows}), integers({num_experts}), integers({num_experts}),
                  integers({num_experts})};

  PlanArgs args{};
  (narrow ? reinterpret_cast<const void*&>(args.index32) : reinterpret_cast<const void*&>(args.index64)) = data(index);
  OptionalTensor score;
  if (priority_of(priority) == Priority::score) {
    STD_TORCH_CHECK(score_in, "plan_routing: score: expected a tensor [T] for priority 'score', got None");
    score = to_contiguous(*score_in, math_type(*score_in));
    const bool wide = dtype_of(*score) == DType::f64;
    (wide ? reinterpret_cast<const void*&>(args.score64) : reinterpret_cast<const void*&>(args.score32)) = data(score);
  }
  args.num_tokens = num_tokens;
  args.k = k;
  args.num_experts = num_experts;
  args.capacity = capacity.value_or(-1);
  args.priority = priority_of(priority);
  args.choice_row = output(std::get<0>(plan));
  args.row_choice = output(std::get<1>(plan));
  args.expert_begin = output(std::get<2>(plan));
  args.expert_count = output(std::get<3>(plan));
  args.expert_demand = output(std::get<4>(plan));
  if (on_gpu(index)) {
    plan_on_gpu(args, index, score);
  } else {
    plan_routing(args);
  }
  return plan;
}

WIDENET_OPS(m) { m.impl("plan_routing", TORCH_BOX(&plan_tokens)); }

}  // namespace widenet

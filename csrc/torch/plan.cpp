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
  plan_routing(args);
  return plan;
}

STABLE_TORCH_LIBRARY_IMPL(widenet_kernels, CPU, m) { m.impl("plan_routing", TORCH_BOX(&plan_tokens)); }

}  // namespace widenet

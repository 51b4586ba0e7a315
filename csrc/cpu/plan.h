// plan_routing: integers only, so one build serves every CPU; it spreads its own work over the threads.
#pragma once

#include <cstdint>

namespace widenet {

enum class Priority { choice, token, score };

struct PlanArgs {
  const int32_t* index32;  // [T, K]; one of the two is given
  const int64_t* index64;
  const float* score32;  // [T], for Priority::score; one of the two is given then
  const double* score64;
  int64_t num_tokens, k, num_experts;
  int64_t capacity;  // -1: dropless, packed
  Priority priority;
  int32_t* choice_row;     // [T, K]
  int32_t* row_choice;     // [R], R = E * C, or T * K when packed
  int32_t* expert_begin;   // [E]
  int32_t* expert_count;   // [E]
  int32_t* expert_demand;  // [E]
};

void plan_routing(const PlanArgs& args);

}  // namespace widenet

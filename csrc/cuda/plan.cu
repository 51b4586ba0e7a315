// plan_routing: counting, scan, placement; three launches, integers alone, so no order of threads can show.
//
// The choices are taken in priority order and cut into parts, a block each. Each counts its demand per expert; the scan
// over the parts gives the rank at which each begins; then each hands out rows. Within a part the ranks of equal
// experts follow from matching lanes, warp by warp. Reads T K indices twice, writes T K + R.
#include "device.h"
#include "kernels.h"

namespace widenet::cuda {
namespace {

constexpr int64_t kMostParts = 512;

struct Parts {
  int64_t number, size;  // of choices: a multiple of kThreads
};

Parts parts_of(int64_t num_choices) {
  const int64_t size = divide_up(divide_up(num_choices, kMostParts), kThreads) * kThreads;
  return {num_choices ? divide_up(num_choices, size) : 1, size};
}

// Positions in priority order, of which each is one choice.
struct Choices {
  const int32_t* index32;
  const int64_t* index64;
  const int64_t* order;
  uint32_t num_tokens, k;
  int num_experts;
  bool by_token;

  __device__ int64_t choice_at(int64_t position) const {
    if (by_token) return position;
    const uint32_t place = static_cast<uint32_t>(position), choice = place / num_tokens;
    const int64_t token = place - choice * num_tokens;
    return (order ? order[token] : token) * k + choice;
  }

  // -1 for an index that is out of range.
  __device__ int expert_of(int64_t choice) const {
    const int64_t expert = index32 ? index32[choice] : index64[choice];
    return expert >= 0 && expert < num_experts ? static_cast<int>(expert) : -1;
  }
};

__device__ inline bool leads(unsigned equal) { return __ffs(equal) - 1 == static_cast<int>(threadIdx.x % kLanes); }

// demand[e, part]
__global__ void __launch_bounds__(kThreads)
    count_kernel(Choices choices, int64_t num_choices, int64_t part_size, int32_t* demand) {
  int32_t* count = shared_memory<int32_t>();
  for (int e = threadIdx.x; e < choices.num_experts; e += kThreads) count[e] = 0;
  __syncthreads();
  for (int64_t first = 0; first < part_size; first += kThreads) {
    const int64_t position = blockIdx.x * part_size + first + threadIdx.x;
    const int expert = position < num_choices ? choices.expert_of(choices.choice_at(position)) : -1;
    const unsigned equal = __match_any_sync(kAllLanes, expert);
    if (expert >= 0 && leads(equal)) atomicAdd(&count[expert], __popc(equal));
  }
  __syncthreads();
  for (int e = threadIdx.x; e < choices.num_experts; e += kThreads) {
    demand[static_cast<int64_t>(e) * gridDim.x + blockIdx.x] = count[e];
  }
}

// The sum of the values of all threads before this one, and of all; kWarps integers of shared memory.
__device__ inline int32_t sum_before(int32_t value, int32_t* of_warps, int32_t& total) {
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  int32_t sum = value;
#pragma unroll
  for (int distance = 1; distance < static_cast<int>(kLanes); distance *= 2) {
    const int32_t other = __shfl_up_sync(kAllLanes, sum, distance);
    if (lane >= distance) sum += other;
  }
  __syncthreads();  // of_warps may still be read from the last time
  if (lane == static_cast<int>(kLanes) - 1) of_warps[warp] = sum;
  __syncthreads();
  total = 0;
  int32_t before = sum - value;
#pragma unroll
  for (int other = 0; other < static_cast<int>(kWarps); ++other) {
    if (other < warp) before += of_warps[other];
    total += of_warps[other];
  }
  return before;
}

// One expert a block: demand[e, part] becomes the demand of the parts before.
__global__ void __launch_bounds__(kThreads) scan_kernel(PlanArgs args, int64_t num_parts, int32_t* demand) {
  int32_t* of_warps = shared_memory<int32_t>();
  demand += blockIdx.x * num_parts;
  int32_t before = 0, total;
  for (int64_t first = 0; first < num_parts; first += kThreads) {
    const int64_t part = first + threadIdx.x;
    const int32_t sum = sum_before(part < num_parts ? demand[part] : 0, of_warps, total);
    if (part < num_parts) demand[part] = before + sum;
    before += total;
  }
  if (threadIdx.x == 0) {
    args.expert_demand[blockIdx.x] = before;
    const bool all = args.capacity < 0 || before <= args.capacity;
    args.expert_count[blockIdx.x] = all ? before : static_cast<int32_t>(args.capacity);
  }
}

// Where every expert's rows begin: into shared memory, and from the first block into the plan.
__device__ inline void find_begins(const PlanArgs& args, int32_t* begin, int32_t* of_warps) {
  int32_t before = 0, total;
  for (int64_t first = 0; first < args.num_experts; first += kThreads) {
    const int64_t e = first + threadIdx.x;
    const int32_t sum = sum_before(e < args.num_experts ? args.expert_count[e] : 0, of_warps, total);
    if (e < args.num_experts) {
      begin[e] = args.capacity < 0 ? before + sum : static_cast<int32_t>(e * args.capacity);
      if (blockIdx.x == 0) args.expert_begin[e] = begin[e];
    }
    before += total;
  }
}

// row_choice = -1 where no choice sits.
__device__ inline void clear_unused_rows(const PlanArgs& args, const int32_t* begin, int64_t num_choices) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads, last = args.num_experts - 1;
  const int64_t served = begin[last] + args.expert_count[last], room = args.capacity < 0 ? 1 : args.capacity;
  const int64_t end = args.capacity < 0 ? num_choices : args.num_experts * args.capacity;
  const int64_t start = (args.capacity < 0 ? served : 0) + static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (int64_t row = start; row < end; row += stride) {
    const int64_t e = args.capacity < 0 ? 0 : static_cast<uint32_t>(row) / static_cast<uint32_t>(room);
    if (args.capacity < 0 || row - e * room >= args.expert_count[e]) args.row_choice[row] = -1;
  }
}

__global__ void __launch_bounds__(kThreads)
    place_kernel(Choices choices, PlanArgs args, int64_t num_choices, int64_t part_size, const int32_t* before) {
  const int num_experts = choices.num_experts, warp = threadIdx.x / kLanes;
  int32_t* begin = shared_memory<int32_t>();  // [E]
  int32_t* rank = begin + num_experts;        // [E]: of the next choice
  int32_t* of_warps = rank + num_experts;     // [warps, E]: equal choices of each warp, then its first rank
  find_begins(args, begin, of_warps);
  for (int e = threadIdx.x; e < num_experts; e += kThreads) {
    rank[e] = before[static_cast<int64_t>(e) * gridDim.x + blockIdx.x];
  }
  __syncthreads();
  clear_unused_rows(args, begin, num_choices);

  for (int64_t first = 0; first < part_size; first += kThreads) {
    for (int i = threadIdx.x; i < static_cast<int>(kWarps) * num_experts; i += kThreads) of_warps[i] = 0;
    __syncthreads();
    const int64_t position = blockIdx.x * part_size + first + threadIdx.x;
    const bool inside = position < num_choices;
    const int64_t choice = inside ? choices.choice_at(position) : 0;
    const int expert = inside ? choices.expert_of(choice) : -1;
    const unsigned equal = __match_any_sync(kAllLanes, expert);
    if (expert >= 0 && leads(equal)) of_warps[warp * num_experts + expert] = __popc(equal);
    __syncthreads();
    for (int e = threadIdx.x; e < num_experts; e += kThreads) {
      for (int w = 0; w < static_cast<int>(kWarps); ++w) {
        const int32_t count = of_warps[w * num_experts + e];
        of_warps[w * num_experts + e] = rank[e];
        rank[e] += count;
      }
    }
    __syncthreads();
    if (inside) {
      int32_t row = -1;
      if (expert >= 0) {
        const unsigned earlier = (1u << threadIdx.x % kLanes) - 1;
        const int32_t mine = of_warps[warp * num_experts + expert] + __popc(equal & earlier);
        if (mine < args.expert_count[expert]) row = begin[expert] + mine;
      }
      args.choice_row[choice] = row;
      if (row >= 0) args.row_choice[row] = static_cast<int32_t>(choice);
    }
    __syncthreads();
  }
}

}  // namespace

int64_t plan_parts(int64_t num_choices) { return parts_of(num_choices).number; }

void plan_routing(const PlanArgs& args, const int64_t* order, int32_t* part_demand, cudaStream_t stream) {
  if (args.num_experts > kMostExperts) {
    throw std::invalid_argument("plan_routing: expected at most 1,024 experts, got " +
                                std::to_string(args.num_experts));
  }
  const int64_t num_choices = args.num_tokens * args.k;
  const Parts parts = parts_of(num_choices);
  const Choices choices{args.index32,
                        args.index64,
                        order,
                        static_cast<uint32_t>(args.num_tokens),
                        static_cast<uint32_t>(args.k),
                        static_cast<int>(args.num_experts),
                        args.priority == Priority::token};
  const size_t experts_bytes = args.num_experts * sizeof(int32_t), warps_bytes = kWarps * sizeof(int32_t);
  launch("plan_routing", count_kernel, parts.number, experts_bytes, stream, choices, num_choices, parts.size,
         part_demand);
  launch("plan_routing", scan_kernel, args.num_experts, warps_bytes, stream, args, parts.number, part_demand);
  launch("plan_routing", place_kernel, parts.number, (2 + kWarps) * experts_bytes, stream, choices, args, num_choices,
         parts.size, part_demand);
}

}  // namespace widenet::cuda

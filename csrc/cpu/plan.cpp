// plan_routing: counting, scan, placement.
//
// The choices are taken in priority order and cut into blocks. Each block counts its demand per expert; a scan over
// the blocks turns counts into the rank at which each block begins; each block then hands out rows. Ranks are exact
// integers, so nothing depends on the number of blocks or threads. Reads T K indices twice, writes T K + R.
#include "plan.h"

#include <algorithm>
#include <numeric>
#include <utility>
#include <vector>

#include "parallel.h"

namespace widenet {
namespace {

constexpr int64_t kBlockChoices = 8192;  // below this a second thread costs more than it brings

// Tokens by falling score, ties in token order, NaN last.
template <class S>
std::vector<int32_t> tokens_by_score(const S* score, int64_t num_tokens) {
  std::vector<int32_t> tokens(num_tokens);
  std::iota(tokens.begin(), tokens.end(), 0);
  std::stable_sort(tokens.begin(), tokens.end(), [score](int32_t a, int32_t b) {
    return score[b] != score[b] ? score[a] == score[a] : score[a] > score[b];
  });
  return tokens;
}

template <class I>
class Planner {
 public:
  Planner(const PlanArgs& args, const I* index) : args_(args), index_(index) {
    if (args.priority == Priority::score) {
      order_ = args.score64 ? tokens_by_score(args.score64, args.num_tokens)
                            : tokens_by_score(args.score32, args.num_tokens);
    }
    num_choices_ = args.num_tokens * args.k;
    const int64_t most = std::max<int64_t>(1, num_choices_ / kBlockChoices);
    num_blocks_ = std::min<int64_t>(num_threads(), most);
    ranks_.assign(num_blocks_ * args.num_experts, 0);
  }

  void run() {
    for_blocks([this](int64_t block) { count(block); });
    scan();
    for_blocks([this](int64_t block) { place(block); });
    clear_unused_rows();
  }

 private:
  // The flat choice at a position of the priority order.
  int64_t choice_at(int64_t position) const {
    if (args_.priority == Priority::token) return position;
    const int64_t token = position % args_.num_tokens;
    return (order_.empty() ? token : order_[token]) * args_.k + position / args_.num_tokens;
  }

  // f(choice, expert) over a block in priority order, with -1 for an index that is out of range.
  template <class F>
  void for_choices(int64_t block, F&& f) const {
    const int64_t end = num_choices_ * (block + 1) / num_blocks_;
    for (int64_t position = num_choices_ * block / num_blocks_; position < end; ++position) {
      const int64_t choice = choice_at(position);
      const int64_t expert = index_[choice];
      f(choice, expert >= 0 && expert < args_.num_experts ? expert : -1);
    }
  }

  template <class F>
  void for_blocks(F&& f) {
    parallel_for(num_blocks_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) f(block);
    });
  }

  void count(int64_t block) {
    int32_t* demand = ranks_.data() + block * args_.num_experts;
    for_choices(block, [&](int64_t, int64_t expert) {
      if (expert >= 0) ++demand[expert];
    });
  }

  void scan() {
    int64_t begin = 0;
    for (int64_t e = 0; e < args_.num_experts; ++e) {
      int32_t demand = 0;
      for (int64_t block = 0; block < num_blocks_; ++block) {
        int32_t& rank = ranks_[block * args_.num_experts + e];
        demand += std::exchange(rank, demand);
      }
      const bool packed = args_.capacity < 0;
      args_.expert_demand[e] = demand;
      args_.expert_count[e] = packed ? demand : static_cast<int32_t>(std::min<int64_t>(demand, args_.capacity));
      args_.expert_begin[e] = static_cast<int32_t>(packed ? begin : e * args_.capacity);
      begin += demand;
    }
  }

  void place(int64_t block) {
    int32_t* ranks = ranks_.data() + block * args_.num_experts;
    for_choices(block, [&](int64_t choice, int64_t expert) {
      int32_t row = -1;
      if (expert >= 0 && ranks[expert] < args_.expert_count[expert]) {
        row = args_.expert_begin[expert] + ranks[expert]++;
        args_.row_choice[row] = static_cast<int32_t>(choice);
      }
      args_.choice_row[choice] = row;
    });
  }

  void clear_unused_rows() {
    int64_t served = 0;
    for (int64_t e = 0; e < args_.num_experts; ++e) {
      served = args_.expert_begin[e] + args_.expert_count[e];
      if (args_.capacity >= 0) {
        std::fill(args_.row_choice + served, args_.row_choice + (e + 1) * args_.capacity, -1);
      }
    }
    if (args_.capacity < 0) std::fill(args_.row_choice + served, args_.row_choice + num_choices_, -1);
  }

  const PlanArgs& args_;
  const I* index_;
  int64_t num_choices_, num_blocks_;
  std::vector<int32_t> order_;  // tokens in score order, empty for the other priorities
  std::vector<int32_t> ranks_;  // [blocks, E]: demand, then the rank at which the block begins
};

}  // namespace

void plan_routing(const PlanArgs& args) {
  if (args.index64) {
    Planner(args, args.index64).run();
  } else {
    Planner(args, args.index32).run();
  }
}

}  // namespace widenet

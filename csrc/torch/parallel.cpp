// Threads for the kernels: torch's own pool.
#include "../cpu/parallel.h"

#include <torch/csrc/stable/ops.h>

namespace widenet {

namespace {

// Whether this thread does its piece of a loop: a loop inside is its own.
thread_local bool inside = false;

}  // namespace

void parallel_for(int64_t size, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  if (size <= 0) return;
  if (inside) return body(0, size);
  torch::stable::parallel_for(0, size, grain, [&body](int64_t begin, int64_t end) {
    struct Inside {
      Inside() { inside = true; }
      ~Inside() { inside = false; }
    } piece;
    body(begin, end);
  });
}

int64_t num_threads() { return inside ? 1 : torch::stable::get_num_threads(); }

}  // namespace widenet

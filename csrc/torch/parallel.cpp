// Threads for the kernels: torch's own pool.
#include "../cpu/parallel.h"

#include <torch/csrc/stable/ops.h>

namespace widenet {

void parallel_for(int64_t size, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  if (size > 0) torch::stable::parallel_for(0, size, grain, body);
}

int64_t num_threads() { return torch::stable::get_num_threads(); }

}  // namespace widenet

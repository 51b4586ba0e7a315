// Threads for the kernels. Whoever links them says how: csrc/torch uses torch's pool, csrc/testing its own threads.
#pragma once

#include <cstdint>
#include <functional>

namespace widenet {

// body(begin, end) over pieces of [0, size), each of at least `grain` where there is as much; inside of a body, all of
// it by the thread that asks.
void parallel_for(int64_t size, int64_t grain, const std::function<void(int64_t, int64_t)>& body);

// 1 inside of a body.
int64_t num_threads();

}  // namespace widenet

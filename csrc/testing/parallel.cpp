#include "parallel.h"

#include <algorithm>
#include <thread>
#include <vector>

#include "../cpu/parallel.h"

namespace widenet {
namespace {

int64_t threads = 1;

}  // namespace

void set_num_threads(int64_t count) { threads = count; }

int64_t num_threads() { return threads; }

void parallel_for(int64_t size, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  if (size <= 0) return;
  const int64_t pieces = std::clamp<int64_t>(size / std::max<int64_t>(grain, 1), 1, threads);
  std::vector<std::jthread> workers;  // joined where they go out of scope
  for (int64_t piece = 1; piece < pieces; ++piece) {
    workers.emplace_back([&body, size, pieces, piece] { body(size * piece / pieces, size * (piece + 1) / pieces); });
  }
  body(0, size / pieces);
}

}  // namespace widenet

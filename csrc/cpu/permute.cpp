// permute: rows[r] = x[token of row r], zero where unused. R D elements read and written; bits are moved, not rounded.
#include "levels.h"
#include "vector.h"

namespace widenet::WIDENET_LEVEL {
namespace {

// A row's token, or zeros for null, register by register, while the next token (or null) comes to the cache: memcpy and
// memset take rows of some kilobytes by rep movsb and rep stosb, which are half as fast.
void write_row(const char* from, const char* next, char* to, int64_t bytes) {
  Lanes<float>::type v{};
  constexpr int64_t step = sizeof(v);
  const char* ahead = next ? next : to;
  int64_t i = 0;
  for (; i + step <= bytes; i += step) {
    __builtin_prefetch(ahead + i);
    if (from) std::memcpy(&v, from + i, step);
    std::memcpy(to + i, &v, step);
  }
  for (; i < bytes; ++i) to[i] = from ? from[i] : 0;
}

}  // namespace

void permute(const PermuteArgs& args, int64_t begin, int64_t end) {
  const char* x = static_cast<const char*>(args.x);
  char* rows = static_cast<char*>(args.rows);
  const auto token_of = [&](int64_t r) -> const char* {
    const int64_t choice = r < end ? args.row_choice[r] : -1;
    return choice >= 0 && choice < args.num_tokens * args.k ? x + choice / args.k * args.row_bytes : nullptr;
  };
  const char* next = token_of(begin);
  for (int64_t r = begin; r < end; ++r) {
    const char* from = next;
    next = token_of(r + 1);
    write_row(from, next, rows + r * args.row_bytes, args.row_bytes);
  }
}

}  // namespace widenet::WIDENET_LEVEL

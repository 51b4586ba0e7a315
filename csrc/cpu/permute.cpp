// permute: rows[r] = x[token of row r], zero where unused. R D elements read and written; bits are moved, not rounded.
#include "levels.h"
#include "vector.h"

namespace widenet::WIDENET_LEVEL {

void permute(const PermuteArgs& args, int64_t begin, int64_t end) {
  const char* x = static_cast<const char*>(args.x);
  char* rows = static_cast<char*>(args.rows);
  for (int64_t r = begin; r < end; ++r) {
    const int64_t choice = args.row_choice[r];
    const int64_t token = choice / args.k;
    if (choice >= 0 && token < args.num_tokens) {
      std::memcpy(rows + r * args.row_bytes, x + token * args.row_bytes, args.row_bytes);
    } else {
      std::memset(rows + r * args.row_bytes, 0, args.row_bytes);
    }
  }
}

}  // namespace widenet::WIDENET_LEVEL

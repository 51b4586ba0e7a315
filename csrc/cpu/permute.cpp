// permute: rows[r] = x[token of row r], zero where unused. R D elements read and written; bits are moved, not rounded.
#include "levels.h"
#include "vector.h"

namespace widenet::WIDENET_LEVEL {

void permute(const PermuteArgs& args, int64_t begin, int64_t end) {
  const char* x = static_cast<const char*>(args.x);
  char* rows = static_cast<char*>(args.rows);
  const int64_t num_choices = args.num_tokens * args.k;
  if (args.row_bytes == 0) return;  // memcpy takes no null pointer, not even for nothing
  for (int64_t r = begin; r < end; ++r) {
    const int64_t choice = args.row_choice[r];
    if (choice >= 0 && choice < num_choices) {
      std::memcpy(rows + r * args.row_bytes, x + choice / args.k * args.row_bytes, args.row_bytes);
    } else {
      std::memset(rows + r * args.row_bytes, 0, args.row_bytes);
    }
  }
}

}  // namespace widenet::WIDENET_LEVEL

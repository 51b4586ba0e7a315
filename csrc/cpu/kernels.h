// The CPU kernels: loops on raw pointers that know no torch.
//
// T tokens, D model dim, F expert hidden dim, E experts, K choices per token, C capacity, R rows. Each kernel does a
// range [begin, end) of its outer dimension, so that the caller spreads it over threads; what it writes does not
// depend on how the range is split. All tensors are contiguous unless a stride is named. The *math type* is double
// for f64 and float for the rest. An index read from a tensor is checked before it is followed.
#pragma once

#include <cstdint>
#include <span>

namespace widenet {

enum class DType { f32, bf16, f16, f64 };
enum class Activation { none, gelu, gelu_tanh, relu, silu, swiglu, geglu };

inline bool is_gated(Activation act) { return act == Activation::swiglu || act == Activation::geglu; }

// Over tokens. z = logits + noise; the k largest z, best first; probs = softmax(z).
struct GateArgs {
  DType type;          // of logits
  const void* logits;  // [T, E]
  const void* noise;   // [T, E] math type, or null
  const bool* mask;    // [T], or null; false: index -1, weight 0
  int64_t num_experts, k;
  bool normalize;         // divide the weights by their sum
  void* weight;           // [T, K] math type
  int32_t* expert_index;  // [T, K]
  void* probs;            // [T, E] math type
};

// Over tokens. The gradient of the gate, plus grad_logits if given. A token whose incoming gradients are all zero has a
// gradient of zero, whatever its probs hold.
struct GateBackwardArgs {
  DType type;                   // f32 or f64, of everything
  const void* grad_weight;      // [T, K], or null
  const void* grad_probs;       // [T, E], or null
  const void* grad_logits;      // [T, E], or null
  const void* weight;           // [T, K]
  const int32_t* expert_index;  // [T, K]
  const void* probs;            // [T, E]
  int64_t num_experts, k;
  bool normalize;
  void* grad;  // [T, E]
};

// Over tokens. logits = x router_weight^T.
struct RouteArgs {
  DType type;                 // of x
  DType math;                 // f32 or f64, of router_weight and logits
  const void* x;              // [T, D]
  const void* router_weight;  // [E, D]
  int64_t num_experts, dim;
  void* logits;  // [T, E]
};

// Over tokens (grad_x = grad router_weight) or over columns of D (grad_router_weight = grad^T x, without the tokens
// whose gradient is all zero: a masked one may hold NaN).
struct RouteBackwardArgs {
  DType type, math;           // of x and grad_x; of the rest
  const void* grad;           // [T, E]
  const void* x;              // [T, D]
  const void* router_weight;  // [E, D]
  int64_t num_tokens, num_experts, dim;
  void* grad_x;              // [T, D]
  void* grad_router_weight;  // [E, D]
};

// Over rows. rows[r] = x[token of row r], 0 where unused.
struct PermuteArgs {
  const void* x;              // [T, row_bytes]
  const int32_t* row_choice;  // [R]
  int64_t num_tokens, k, row_bytes;
  void* rows;  // [R, row_bytes]
};

// Over tokens. y[t] = sum over k of weight[t, k] * (rows[choice_row[t, k]] + bias[its expert]), in k order.
struct CombineArgs {
  DType type;                   // of rows, bias and y
  DType math;                   // f32 or f64, of weight and the sum
  const void* rows;             // [R, D]
  const void* weight;           // [T, K], or null: 1
  const void* bias;             // [E, D], or null
  const int32_t* choice_row;    // [T, K]
  const int32_t* expert_begin;  // [E], needed with a bias
  int64_t num_rows, num_experts, k, dim;
  void* y;  // [T, D]
};

// Over rows. grad_rows[r] = weight * grad[token], 0 where unused; grad_weight[choice] = <grad[token], rows[r]>. Zeros
// for the choices without a row come from the CUDA kernel itself, and have to be there before the CPU kernel.
struct CombineBackwardArgs {
  DType type;                 // of grad, rows and grad_rows
  DType math;                 // f32 or f64, of weight and grad_weight
  const void* grad;           // [T, D]
  const void* rows;           // [R, D]
  const void* weight;         // [T, K]
  const int32_t* choice_row;  // [T, K]; the CUDA kernel's alone
  const int32_t* row_choice;  // [R]
  int64_t num_tokens, k, dim;
  void* grad_rows;    // [R, D], or null
  void* grad_weight;  // [T, K], or null
};

// Over the rows of one expert. z += bias in place; out = act(z), which may be z itself unless gated.
struct ActivationArgs {
  DType type;
  Activation act;
  int64_t width;     // F; z is twice as wide when gated
  const void* bias;  // as wide as z, or null
  void* z;           // [rows, F or 2F]
  void* out;         // [rows, F]; with Activation::none unused
};

// Column sums are taken in chunks of this many rows, so that their bits do not depend on the number of threads.
constexpr int64_t kChunkRows = 32;

// Over chunks of the rows of one expert. With h = act(z) and g = grad: grad_z = row_weight * g * act'(z).
struct ActivationBackwardArgs {
  DType type;
  Activation act;           // not none
  int64_t num_rows, width;  // F; z and grad_z are twice as wide when gated
  const void* z;            // [rows, F or 2F]
  const void* grad;         // [rows, F], or null: 0
  const void* row_weight;   // [rows] math type, or null: 1
  void* grad_z;             // [rows, F or 2F], or null; may be grad itself unless gated
  void* scaled;             // [rows, F] = row_weight * h, or null
  void* dot;                // [rows] math type = <g, h>, or null
  void* column_sums;        // [chunks, F or 2F] math type: sums of grad_z, or null
};

// Over chunks of rows. column_sums[chunk] = sum of row_weight * rows.
struct ColumnSumArgs {
  DType type;
  int64_t num_rows, width;
  const void* rows;        // [rows, width]
  const void* row_weight;  // [rows] math type, or null: 1
  void* column_sums;       // [chunks, width] math type
};

// Over columns. out = (+)= sum over chunks.
struct ReduceChunksArgs {
  DType type;  // of out; column_sums has the math type of `sums`
  DType sums;
  int64_t num_chunks, width;
  const void* column_sums;  // [chunks, width]
  bool accumulate;
  void* out;  // [width]
};

// Over the rows of one expert. grad_weight[choice of row] = dot[row] + <grad[row], bias>.
struct WeightGradientArgs {
  DType type;  // of grad and bias
  int64_t num_choices, dim;
  const void* dot;            // [rows] math type
  const void* grad;           // [rows, D]
  const void* bias;           // [D], or null
  const int32_t* row_choice;  // [rows]
  void* grad_weight;          // [T, K] math type
};

// Over elements. sum += values.
struct AccumulateArgs {
  DType type;  // of values
  const void* values;
  float* sum;
};

// A matrix of any layout.
struct Operand {
  const void* data;
  int64_t row_stride, column_stride;  // in elements
};

// out [M, N] (+)= a [M, K] b [K, N], summed in float. First `gemm_pack` over the tiles of a's rows, then `gemm` over
// the row_parts * column_parts parts of out. Or, where a's rows and b's columns each lie in one piece, `gemm_dots` over
// groups of the tile's dot_columns columns, which packs nothing and knows no sums outside: of f32 or bf16, and no more
// rows than the tile says. The columns are one group at least, and what is less goes with the last.
struct GemmArgs {
  DType type;  // of a, b and out: f32, bf16 or f16
  int64_t m, n, k;
  int64_t piece;  // of K, the products that are summed in registers; at most the tile's depth or bf16_depth
  Operand a, b;
  float* packed_a;  // [M rounded up to whole tiles, K]
  int64_t row_parts, column_parts;
  bool fetch_ahead;  // the next part's b while this one's is multiplied
  bool accumulate;   // add to what is in sums
  float* sums;       // [M, N], rows sums_stride apart
  int64_t sums_stride;
  void* out;  // [M, N] of `type`, rows out_stride apart, or null: the sums are the result
  int64_t out_stride;
};

// The sizes that gemm cuts its matrices into.
struct GemmTile {
  int64_t rows, columns, depth;     // of what is summed in registers, at most
  bool pairs;                       // of neighbours of K are multiplied as one, in bf16
  int64_t bf16_depth;               // as depth, for an out of bf16
  int64_t part_columns;             // a part has at most so many
  int64_t few_rows;                 // and half as many where the rows are so few that b should be fetched ahead
  int64_t dot_columns;              // a group of gemm_dots
  int64_t dot_rows, bf16_dot_rows;  // that it is taken for, at most
};

struct Kernels {
  const char* level;  // of vector instructions
  void (*gate)(const GateArgs&, int64_t begin, int64_t end);
  void (*gate_backward)(const GateBackwardArgs&, int64_t begin, int64_t end);
  void (*route)(const RouteArgs&, int64_t begin, int64_t end);
  void (*route_backward_x)(const RouteBackwardArgs&, int64_t begin, int64_t end);
  void (*route_backward_weight)(const RouteBackwardArgs&, int64_t begin, int64_t end);
  void (*permute)(const PermuteArgs&, int64_t begin, int64_t end);
  void (*combine)(const CombineArgs&, int64_t begin, int64_t end);
  void (*combine_backward)(const CombineBackwardArgs&, int64_t begin, int64_t end);
  void (*activation)(const ActivationArgs&, int64_t begin, int64_t end);
  void (*activation_backward)(const ActivationBackwardArgs&, int64_t begin, int64_t end);
  void (*column_sum)(const ColumnSumArgs&, int64_t begin, int64_t end);
  void (*reduce_chunks)(const ReduceChunksArgs&, int64_t begin, int64_t end);
  void (*weight_gradient)(const WeightGradientArgs&, int64_t begin, int64_t end);
  void (*accumulate)(const AccumulateArgs&, int64_t begin, int64_t end);
  void (*gemm_pack)(const GemmArgs&, int64_t begin, int64_t end);
  void (*gemm)(const GemmArgs&, int64_t begin, int64_t end);
  void (*gemm_dots)(const GemmArgs&, int64_t begin, int64_t end);
  const GemmTile* gemm_tile;
};

// The kernels of every level that this CPU can run, the highest first.
std::span<const Kernels> supported_kernels();

// Those of the level that is the fastest on this CPU.
const Kernels& kernels();

bool is_intel();
bool has_tiles();  // instructions for products of tiles of bf16 (AMX)

}  // namespace widenet

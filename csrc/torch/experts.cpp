#include "experts.h"

#include <algorithm>
#include <numeric>

#include "../cpu/parallel.h"

namespace widenet {
namespace {

constexpr int64_t kSmallExpert = 128;     // rows: the products of more take longer than the threads take to meet
constexpr int64_t kLeastShare = 1 << 20;  // multiplications
constexpr int64_t kWeightRows = 8;        // to read an expert's weights takes the time of so many rows
constexpr double kUnevenness = 1.05;      // of the largest share to the mean

// Of as many shares as there are threads: the largest experts first, each to the share that has the least.
std::vector<Experts> shares_of(Experts experts) {
  std::ranges::stable_sort(experts, std::greater(), &ExpertRows::count);
  std::vector<Experts> shares(num_threads());
  std::vector<int64_t> load(shares.size(), 0);
  for (const ExpertRows& rows : experts) {
    const auto least = std::ranges::min_element(load) - load.begin();
    shares[least].push_back(rows);
    load[least] += rows.count + kWeightRows;
  }
  const double mean = std::reduce(load.begin(), load.end()) / static_cast<double>(load.size());
  return std::ranges::max(load) <= kUnevenness * mean ? shares : std::vector<Experts>();
}

// Dense, its dimensions in memory in the order of `like`; those that it repeats come first.
Tensor dense_like(const Tensor& like) {
  Sizes sizes, strides(like.dim()), order(like.dim());
  for (int64_t i = 0; i < like.dim(); ++i) sizes.push_back(like.size(i));
  std::iota(order.rbegin(), order.rend(), int64_t{0});
  std::ranges::stable_sort(order, {}, [&](int64_t i) { return like.stride(i) ? like.stride(i) : INT64_MAX; });
  int64_t stride = 1;
  for (const int64_t i : order) {
    strides[i] = stride;
    stride *= std::max<int64_t>(sizes[i], 1);
  }
  return new_tensor(sizes, strides, like.scalar_type(), aoti_torch_device_type_cpu(), 0);
}

int64_t grain_rows(int64_t width) { return kGrainElements / (width + 1) + 1; }

}  // namespace

Experts rows_of_experts(const Tensor& expert_begin, const Tensor& expert_count, int64_t num_rows) {
  const Tensor begins = to_contiguous(expert_begin), counts = to_contiguous(expert_count);
  Experts experts;
  for (int64_t e = 0; e < begins.size(0); ++e) {
    const int64_t begin = std::clamp<int64_t>(integers(begins)[e], 0, num_rows);
    experts.push_back({e, begin, std::clamp<int64_t>(integers(counts)[e], 0, num_rows - begin)});
  }
  return experts;
}

int64_t most_rows(const Experts& experts) {
  int64_t most = 0;
  for (const ExpertRows& rows : experts) most = std::max(most, rows.count);
  return most;
}

void over_experts(const Experts& experts, int64_t products, const std::function<Job(const Experts&)>& prepare) {
  int64_t total = 0;
  for (const ExpertRows& rows : experts) total += rows.count;
  const bool small = most_rows(experts) <= kSmallExpert && total * products >= kLeastShare * num_threads();
  const auto shares = small ? shares_of(experts) : std::vector<Experts>();
  if (shares.empty()) return prepare(experts)();
  std::vector<Job> jobs;
  for (const Experts& share : shares) jobs.push_back(prepare(share));
  parallel_for(static_cast<int64_t>(jobs.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) jobs[i]();
  });
}

void zero_unused_rows(const Matrix& out, const Experts& experts) {
  int64_t served = 0;
  for (const ExpertRows& rows : experts) {
    if (rows.begin > served) zero(out.slice(served, rows.begin - served));
    served = std::max(served, rows.begin + rows.count);
  }
  if (out.rows > served) zero(out.slice(served, out.rows - served));
}

Activation activation_of(const std::string& name) {
  if (name.empty()) return Activation::none;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  if (name == "relu") return Activation::relu;
  if (name == "silu") return Activation::silu;
  if (name == "swiglu") return Activation::swiglu;
  STD_TORCH_CHECK(name == "geglu", "widenet_kernels: activation: there is no ", name);
  return Activation::geglu;
}

void activate(const Matrix& z, const OptionalTensor& bias, int64_t expert, Activation act, const Matrix& out) {
  if (act == Activation::none && !bias) return;
  const void* row = bias ? row_of(*bias, expert) : nullptr;
  const ActivationArgs args{dtype_of(z.type), act, out.columns, row, z.data, out.data};
  parallel_for(z.rows, grain_rows(z.columns),
               [&](int64_t begin, int64_t end) { kernels().activation(args, begin, end); });
}

void activate_backward(const ActivationBackwardArgs& args) {
  parallel_for(num_chunks(args.num_rows), grain_rows(args.width) / kChunkRows + 1,
               [&](int64_t begin, int64_t end) { kernels().activation_backward(args, begin, end); });
}

int64_t num_chunks(int64_t rows) { return (rows + kChunkRows - 1) / kChunkRows; }

void sum_columns(const Matrix& rows, const void* row_weight, void* column_sums) {
  const ColumnSumArgs args{dtype_of(rows.type), rows.rows, rows.columns, rows.data, row_weight, column_sums};
  parallel_for(num_chunks(rows.rows), grain_rows(rows.columns) / kChunkRows + 1,
               [&](int64_t begin, int64_t end) { kernels().column_sum(args, begin, end); });
}

void GradSink::product(int64_t expert, const Matrix& a, const Matrix& b) const {
  const Matrix out = matrix(tensor_, expert);
  if (!accumulate_ || a.type == ScalarType::Float) return gemm(out, a, b, accumulate_);
  const Scratch product(tensor_, out.rows, out.columns, a.type);
  gemm(product.rows(out.rows), a, b);
  const AccumulateArgs args{dtype_of(a.type), product.data(), static_cast<float*>(out.data)};
  parallel_for(out.rows * out.columns, kGrainElements,
               [&](int64_t begin, int64_t end) { kernels().accumulate(args, begin, end); });
}

void GradSink::sum(int64_t expert, const void* column_sums, DType math, int64_t num_chunks) const {
  const ReduceChunksArgs args{dtype_of(tensor_),      math, num_chunks, tensor_.size(1), column_sums, accumulate_,
                              row_of(tensor_, expert)};
  parallel_for(args.width, kGrainElements,
               [&](int64_t begin, int64_t end) { kernels().reduce_chunks(args, begin, end); });
}

void GradSink::nothing_served(int64_t expert) const {
  if (!needed_ || accumulate_) return;
  zero(tensor_.dim() == 3 ? matrix(tensor_, expert) : matrix(tensor_).slice(expert, 1));
}

GradSink weight_sink(const Tensor& weight, bool needed) {
  return needed ? GradSink::new_tensor(dense_like(weight)) : GradSink(weight);
}

GradSink bias_sink(const Tensor& weight, int64_t width, bool needed) {
  return needed ? GradSink::new_tensor(empty_tensor(weight, {weight.size(0), width})) : GradSink(weight);
}

}  // namespace widenet

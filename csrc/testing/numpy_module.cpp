// Every raw kernel of csrc/cpu as a function on NumPy arrays, for the tests; never part of the wheel.
//
// level= names the vector instructions, "" the best ones; "cuda" is the kernel of csrc/cuda under the emulator. The
// work is cut as finely as the threads allow, whatever its size.
#include "numpy_module.h"

#include <algorithm>
#include <limits>
#include <tuple>

#include "../cpu/parallel.h"
#include "../cpu/plan.h"
#include "../cuda/kernels.h"
#include "arrays.h"
#include "cuda_emulator.h"
#include "parallel.h"

namespace widenet {

const Kernels& kernels_of(const std::string& level) {
  for (const Kernels& kernels : supported_kernels()) {
    if (level.empty() || level == kernels.level) return kernels;
  }
  throw std::invalid_argument("level: this CPU cannot run '" + level + "'");
}

namespace {

template <class Args>
void run(void (*kernel)(const Args&, int64_t, int64_t), const Args& args, int64_t size) {
  parallel_for(size, 1, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

template <class Args>
using CpuKernel = void (*Kernels::*)(const Args&, int64_t, int64_t);
template <class Args>
using CudaKernel = void (*)(const Args&, int64_t, cudaStream_t);

template <class Args>
void run(const std::string& level, CpuKernel<Args> on_cpu, CudaKernel<Args> on_gpu, const Args& args, int64_t size) {
  if (level == "cuda") {
    on_gpu(args, size, nullptr);
  } else {
    run(kernels_of(level).*on_cpu, args, size);
  }
}

Activation activation_of(const std::string& name) {
  const std::pair<const char*, Activation> names[] = {
      {"gelu", Activation::gelu}, {"gelu_tanh", Activation::gelu_tanh}, {"relu", Activation::relu},
      {"silu", Activation::silu}, {"swiglu", Activation::swiglu},       {"geglu", Activation::geglu}};
  for (const auto& [known, activation] : names) {
    if (name == known) return activation;
  }
  throw std::invalid_argument("activation: there is no '" + name + "'");
}

int64_t width_of(int64_t wide, Activation act) {
  require(!is_gated(act) || wide % 2 == 0, "z", "an even width for a gated activation");
  return is_gated(act) ? wide / 2 : wide;
}

using Outputs = std::vector<std::string>;

bool wanted(const Outputs& outputs, const char* name) {
  return std::find(outputs.begin(), outputs.end(), name) != outputs.end();
}

int64_t num_chunks(int64_t rows) { return (rows + kChunkRows - 1) / kChunkRows; }

auto gate(const array& logits, int64_t k, const Optional& noise, const Optional& mask, bool normalize,
          const std::string& level) {
  const DType type = float_dtype("logits", logits), math = math_of(type);
  const Shape shape = shape_of("logits", logits, 2);
  require(1 <= k && k <= shape[1], "k", "1 to the number of experts");
  Output weight(math, {shape[0], k}), index = integers({shape[0], k}), probs(math, shape);
  const GateArgs args{type,
                      input("logits", logits, type, shape),
                      input("noise", noise, math, shape),
                      static_cast<const bool*>(input("mask", mask, py::dtype::of<bool>(), {shape[0]})),
                      shape[1],
                      k,
                      normalize,
                      weight.data(),
                      index.data<int32_t>(),
                      probs.data()};
  run(level, &Kernels::gate, &cuda::gate, args, shape[0]);
  return std::tuple(weight.result, index.result, probs.result);
}

auto gate_backward(const Optional& grad_weight, const Optional& grad_probs, const Optional& grad_logits,
                   const array& weight, const array& expert_index, const array& probs, bool normalize,
                   const std::string& level) {
  const DType type = math_dtype("probs", probs);
  const Shape shape = shape_of("probs", probs, 2);
  const Shape chosen{shape[0], shape_of("weight", weight, 2)[1]};
  Output grad(type, shape);
  const GateBackwardArgs args{type,
                              input("grad_weight", grad_weight, type, chosen),
                              input("grad_probs", grad_probs, type, shape),
                              input("grad_logits", grad_logits, type, shape),
                              input("weight", weight, type, chosen),
                              integers("expert_index", expert_index, chosen),
                              input("probs", probs, type, shape),
                              shape[1],
                              chosen[1],
                              normalize,
                              grad.data()};
  run(level, &Kernels::gate_backward, &cuda::gate_backward, args, shape[0]);
  return grad.result;
}

auto route(const array& x, const array& router_weight, const std::string& level) {
  const DType type = float_dtype("x", x), math = math_dtype("router_weight", router_weight);
  require(type != DType::f64 || math == DType::f64, "router_weight", "float64, as x is");
  const Shape shape = shape_of("x", x, 2);
  const py::ssize_t num_experts = shape_of("router_weight", router_weight, 2)[0];
  Output logits(math, {shape[0], num_experts});
  const RouteArgs args{type,
                       math,
                       input("x", x, type, shape),
                       input("router_weight", router_weight, math, {num_experts, shape[1]}),
                       num_experts,
                       shape[1],
                       logits.data()};
  run(kernels_of(level).route, args, shape[0]);
  return logits.result;
}

enum class RouteGradient { x, weight };

template <RouteGradient wanted>
auto route_backward(const array& grad, const array& x, const array& router_weight, const std::string& level) {
  const DType type = float_dtype("x", x), math = math_dtype("router_weight", router_weight);
  require(type != DType::f64 || math == DType::f64, "router_weight", "float64, as x is");
  const Shape shape = shape_of("x", x, 2);
  const py::ssize_t num_experts = shape_of("router_weight", router_weight, 2)[0];
  const Shape weight_shape{num_experts, shape[1]};
  Output out = wanted == RouteGradient::x ? Output(type, shape) : Output(math, weight_shape);
  const RouteBackwardArgs args{type,
                               math,
                               input("grad", grad, math, {shape[0], num_experts}),
                               input("x", x, type, shape),
                               input("router_weight", router_weight, math, weight_shape),
                               shape[0],
                               num_experts,
                               shape[1],
                               wanted == RouteGradient::x ? out.data() : nullptr,
                               wanted == RouteGradient::x ? nullptr : out.data()};
  if (level == "cuda") {
    Output partial(math, {cuda::route_parts(shape[0]), num_experts, shape[1]});
    cuda::route_backward(args, wanted == RouteGradient::x ? nullptr : partial.data(), nullptr);
  } else if (wanted == RouteGradient::x) {
    run(kernels_of(level).route_backward_x, args, shape[0]);
  } else {
    run(kernels_of(level).route_backward_weight, args, shape[1]);
  }
  return out.result;
}

auto asked_rows(const array& grad, const array& x) {
  const DType type = float_dtype("x", x), math = math_dtype("grad", grad);
  require(type != DType::f64 || math == DType::f64, "grad", "float64, as x is");
  const Shape shape = shape_of("x", x, 2);
  const py::ssize_t num_experts = shape_of("grad", grad, 2)[1];
  Output rows(math, shape);
  const cuda::AskedRowsArgs args{
      type,     math,       input("grad", grad, math, {shape[0], num_experts}), input("x", x, type, shape), num_experts,
      shape[1], rows.data()};
  cuda::asked_rows(args, shape[0], nullptr);
  return rows.result;
}

// ``order``: the tokens as the score takes them, which the CUDA kernels ask for in its place.
auto plan(const array& expert_index, int64_t num_experts, std::optional<int64_t> capacity, const std::string& priority,
          const Optional& score, const Optional& order, const std::string& level) {
  const Shape shape = shape_of("expert_index", expert_index, 2);
  constexpr int64_t most = std::numeric_limits<int32_t>::max();
  require(shape[0] <= most && shape[1] <= most && shape[0] * shape[1] <= most, "expert_index", "T K below 2**31");
  require(1 <= num_experts && num_experts <= most, "num_experts", "1 to 2**31 - 1");
  require(!capacity || (0 <= *capacity && *capacity <= most / num_experts), "capacity", "0 or more, E C below 2**31");
  require(priority == "choice" || priority == "token" || priority == "score", "priority", "choice, token or score");
  const bool on_gpu = level == "cuda";
  require((priority == "score") == (on_gpu ? order : score).has_value(), on_gpu ? "order" : "score",
          "an array if and only if priority is 'score'");
  Output choice_row = integers(shape),
         row_choice = integers({capacity ? num_experts * *capacity : shape[0] * shape[1]}),
         begin = integers({num_experts}), count = integers({num_experts}), demand = integers({num_experts});
  PlanArgs args{};
  if (expert_index.dtype().equal(py::dtype::of<int64_t>())) {
    args.index64 = static_cast<const int64_t*>(input("expert_index", expert_index, py::dtype::of<int64_t>(), shape));
  } else {
    args.index32 = integers("expert_index", expert_index, shape);
  }
  if (score) {
    const DType type = math_dtype("score", *score);
    const void* scores = input("score", *score, type, {shape[0]});
    (type == DType::f64 ? reinterpret_cast<const void*&>(args.score64) : reinterpret_cast<const void*&>(args.score32)) =
        scores;
  }
  args.num_tokens = shape[0];
  args.k = shape[1];
  args.num_experts = num_experts;
  args.capacity = capacity.value_or(-1);
  args.priority = priority == "choice" ? Priority::choice : priority == "token" ? Priority::token : Priority::score;
  args.choice_row = choice_row.data<int32_t>();
  args.row_choice = row_choice.data<int32_t>();
  args.expert_begin = begin.data<int32_t>();
  args.expert_count = count.data<int32_t>();
  args.expert_demand = demand.data<int32_t>();
  if (on_gpu) {
    std::vector<int32_t> part_demand(cuda::plan_parts(args.num_tokens * args.k) * num_experts);
    const void* tokens = input("order", order, py::dtype::of<int64_t>(), {shape[0]});
    cuda::plan_routing(args, static_cast<const int64_t*>(tokens), part_demand.data(), nullptr);
  } else {
    plan_routing(args);
  }
  return std::tuple(choice_row.result, row_choice.result, begin.result, count.result, demand.result);
}

auto permute(const array& x, const array& row_choice, int64_t k, const std::string& level) {
  const DType type = float_dtype("x", x);
  const Shape shape = shape_of("x", x, 2), num_rows = shape_of("row_choice", row_choice, 1);
  require(k >= 0, "k", "0 or more");
  Output rows(type, {num_rows[0], shape[1]});
  const PermuteArgs args{input("x", x, type, shape),
                         integers("row_choice", row_choice, num_rows),
                         shape[0],
                         k,
                         shape[1] * x.itemsize(),
                         rows.data()};
  run(level, &Kernels::permute, &cuda::permute, args, num_rows[0]);
  return rows.result;
}

auto combine(const array& rows, const Optional& weight, const array& choice_row, const Optional& bias,
             const Optional& expert_begin, const std::string& level) {
  const DType type = float_dtype("rows", rows), math = weight ? math_dtype("weight", *weight) : math_of(type);
  require(type != DType::f64 || math == DType::f64, "weight", "float64, as the rows are");
  const Shape shape = shape_of("rows", rows, 2), choices = shape_of("choice_row", choice_row, 2);
  const py::ssize_t num_experts = bias ? shape_of("bias", *bias, 2)[0] : 0;
  require(bias.has_value() == expert_begin.has_value(), "expert_begin", "an array if and only if there is a bias");
  require(!bias || num_experts > 0, "bias", "at least one expert");
  Output y(type, {choices[0], shape[1]});
  const CombineArgs args{type,
                         math,
                         input("rows", rows, type, shape),
                         input("weight", weight, math, choices),
                         input("bias", bias, type, {num_experts, shape[1]}),
                         integers("choice_row", choice_row, choices),
                         integers("expert_begin", expert_begin, {num_experts}),
                         shape[0],
                         num_experts,
                         choices[1],
                         shape[1],
                         y.data()};
  run(level, &Kernels::combine, &cuda::combine, args, choices[0]);
  return y.result;
}

// grad_rows, grad_weight: those that are in `outputs`, else None.
auto combine_backward(const array& grad, const array& rows, const array& weight, const array& choice_row,
                      const array& row_choice, const Outputs& outputs, const std::string& level) {
  const DType type = float_dtype("rows", rows), math = math_dtype("weight", weight);
  require(type != DType::f64 || math == DType::f64, "weight", "float64, as the rows are");
  const Shape shape = shape_of("rows", rows, 2), choices = shape_of("weight", weight, 2);
  Output grad_rows, grad_weight;
  if (wanted(outputs, "grad_rows")) grad_rows = Output(type, shape);
  if (wanted(outputs, "grad_weight")) grad_weight = level == "cuda" ? Output(math, choices) : zeros(math, choices);
  const CombineBackwardArgs args{type,
                                 math,
                                 input("grad", grad, type, {choices[0], shape[1]}),
                                 input("rows", rows, type, shape),
                                 input("weight", weight, math, choices),
                                 integers("choice_row", choice_row, choices),
                                 integers("row_choice", row_choice, {shape[0]}),
                                 choices[0],
                                 choices[1],
                                 shape[1],
                                 grad_rows.data(),
                                 grad_weight.data()};
  run(level, &Kernels::combine_backward, &cuda::combine_backward, args, shape[0]);
  return std::tuple(grad_rows.result, grad_weight.result);
}

// z + bias and act(z + bias); in place they are one array. Without an activation there is only the first.
auto activation(const array& z_in, const std::optional<std::string>& name, const Optional& bias, bool in_place,
                const std::string& level) {
  const DType type = float_dtype("z", z_in);
  const Activation act = name ? activation_of(*name) : Activation::none;
  const Shape shape = shape_of("z", z_in, 2);
  const int64_t width = width_of(shape[1], act);
  require(!in_place || !is_gated(act), "in_place", "False for a gated activation");
  Output z = copy("z", z_in, type, shape), out;
  if (name) out = in_place ? z : Output(type, {shape[0], width});
  const ActivationArgs args{type, act, width, input("bias", bias, type, {shape[1]}), z.data(), out.data()};
  run(kernels_of(level).activation, args, shape[0]);
  return std::tuple(z.result, out.result);
}

// grad_z, scaled, dot, column_sums: those that are in `outputs`, else None. In place, grad_z is written over grad.
auto activation_backward(const array& z, const Optional& grad_in, const std::string& name, const Optional& row_weight,
                         const Outputs& outputs, bool in_place, const std::string& level) {
  const DType type = float_dtype("z", z), math = math_of(type);
  const Activation act = activation_of(name);
  const Shape shape = shape_of("z", z, 2);
  const int64_t width = width_of(shape[1], act);
  const Shape narrow{shape[0], width};
  require(!in_place || (grad_in && !is_gated(act)), "in_place", "False without grad or for a gated activation");
  Output grad, grad_z, scaled, dot, sums;
  if (grad_in) grad = copy("grad", *grad_in, type, narrow);
  if (wanted(outputs, "grad_z")) grad_z = in_place ? grad : Output(type, shape);
  if (wanted(outputs, "scaled")) scaled = Output(type, narrow);
  if (wanted(outputs, "dot")) dot = Output(math, {shape[0]});
  if (wanted(outputs, "column_sums")) sums = Output(math, {num_chunks(shape[0]), shape[1]});
  require(!sums.result || grad_z.result, "outputs", "grad_z where column_sums is");
  const ActivationBackwardArgs args{type,
                                    act,
                                    shape[0],
                                    width,
                                    input("z", z, type, shape),
                                    grad.data(),
                                    input("row_weight", row_weight, math, {shape[0]}),
                                    grad_z.data(),
                                    scaled.data(),
                                    dot.data(),
                                    sums.data()};
  run(kernels_of(level).activation_backward, args, num_chunks(shape[0]));
  return std::tuple(grad_z.result, scaled.result, dot.result, sums.result);
}

auto column_sum(const array& rows, const Optional& row_weight, const std::string& level) {
  const DType type = float_dtype("rows", rows), math = math_of(type);
  const Shape shape = shape_of("rows", rows, 2);
  Output sums(math, {num_chunks(shape[0]), shape[1]});
  const ColumnSumArgs args{type,
                           shape[0],
                           shape[1],
                           input("rows", rows, type, shape),
                           input("row_weight", row_weight, math, {shape[0]}),
                           sums.data()};
  run(kernels_of(level).column_sum, args, num_chunks(shape[0]));
  return sums.result;
}

// The sum over chunks in the dtype of `initial`, in its place or, to accumulate, on top of it.
auto reduce_chunks(const array& column_sums, const array& initial, bool accumulate, const std::string& level) {
  const DType type = float_dtype("initial", initial), math = math_dtype("column_sums", column_sums);
  const Shape shape = shape_of("column_sums", column_sums, 2);
  Output out = copy("initial", initial, type, {shape[1]});
  const ReduceChunksArgs args{type,       math,      shape[0], shape[1], input("column_sums", column_sums, math, shape),
                              accumulate, out.data()};
  run(kernels_of(level).reduce_chunks, args, shape[1]);
  return out.result;
}

auto weight_gradient(const array& dot, const array& grad, const array& row_choice, int64_t num_choices,
                     const Optional& bias, const std::string& level) {
  const DType type = float_dtype("grad", grad), math = math_of(type);
  const Shape shape = shape_of("grad", grad, 2);
  require(num_choices >= 0, "num_choices", "0 or more");
  Output out = zeros(math, {num_choices});
  const WeightGradientArgs args{type,
                                num_choices,
                                shape[1],
                                input("dot", dot, math, {shape[0]}),
                                input("grad", grad, type, shape),
                                input("bias", bias, type, {shape[1]}),
                                integers("row_choice", row_choice, {shape[0]}),
                                out.data()};
  run(kernels_of(level).weight_gradient, args, shape[0]);
  return out.result;
}

auto accumulate(const array& values, const array& sum, const std::string& level) {
  const DType type = float_dtype("values", values);
  const Shape shape = shape_of("values", values, 1);
  Output out = copy("sum", sum, DType::f32, shape);
  run(kernels_of(level).accumulate, AccumulateArgs{type, input("values", values, type, shape), out.data<float>()},
      shape[0]);
  return out.result;
}

}  // namespace

PYBIND11_MODULE(_numpy_kernels, m) {
  using namespace pybind11::literals;
  const py::arg_v level("level", "");
  const auto optional = [](const char* name) { return py::arg_v(name, py::none()); };

  m.def("levels", [] {
    std::vector<std::string> names;
    for (const Kernels& kernels : supported_kernels()) names.emplace_back(kernels.level);
    return names;
  });
  m.def("num_threads", &num_threads);
  m.def("set_emulator_seed", [](uint64_t seed) { emulator::seed = seed; });
  m.def("set_num_threads", [](int64_t count) {
    require(1 <= count && count <= 256, "count", "1 to 256");
    set_num_threads(count);
  });

  m.def("gate", &gate, "logits"_a, "k"_a, optional("noise"), optional("mask"), "normalize"_a = false, level);
  m.def("gate_backward", &gate_backward, "grad_weight"_a, "grad_probs"_a, "grad_logits"_a, "weight"_a, "expert_index"_a,
        "probs"_a, "normalize"_a = false, level);
  m.def("route", &route, "x"_a, "router_weight"_a, level);
  m.def("route_backward_x", &route_backward<RouteGradient::x>, "grad"_a, "x"_a, "router_weight"_a, level);
  m.def("route_backward_weight", &route_backward<RouteGradient::weight>, "grad"_a, "x"_a, "router_weight"_a, level);
  m.def("asked_rows", &asked_rows, "grad"_a, "x"_a);
  m.def("plan_routing", &plan, "expert_index"_a, "num_experts"_a, optional("capacity"), "priority"_a = "choice",
        optional("score"), optional("order"), level);
  m.def("permute", &permute, "x"_a, "row_choice"_a, "k"_a, level);
  m.def("combine", &combine, "rows"_a, "weight"_a, "choice_row"_a, optional("bias"), optional("expert_begin"), level);
  m.def("combine_backward", &combine_backward, "grad"_a, "rows"_a, "weight"_a, "choice_row"_a, "row_choice"_a,
        "outputs"_a = Outputs{"grad_rows", "grad_weight"}, level);
  m.def("activation", &activation, "z"_a, "activation"_a, optional("bias"), "in_place"_a = false, level);
  m.def("activation_backward", &activation_backward, "z"_a, "grad"_a, "activation"_a, optional("row_weight"),
        "outputs"_a = Outputs{"grad_z", "scaled", "dot", "column_sums"}, "in_place"_a = false, level);
  m.def("column_sum", &column_sum, "rows"_a, optional("row_weight"), level);
  m.def("reduce_chunks", &reduce_chunks, "column_sums"_a, "initial"_a, "accumulate"_a = false, level);
  m.def("weight_gradient", &weight_gradient, "dot"_a, "grad"_a, "row_choice"_a, "num_choices"_a, optional("bias"),
        level);
  m.def("accumulate", &accumulate, "values"_a, "sum"_a, level);
  add_gemm(m);

#ifdef WIDENET_SANITIZED
  // What the sanitizers must catch, so that a test can see that they are on.
  m.def("read_past_the_end", [](const py::array_t<float, array::c_style>& a) { return a.data()[a.size()]; });
  m.def("overflow", [](int32_t a) { return a + 1; });
#endif
}

}  // namespace widenet

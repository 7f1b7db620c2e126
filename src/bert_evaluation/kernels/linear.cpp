// The operators `bert_evaluation::linear` and `linears`: their arguments checked, and the products that are computed for them.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>
#include <optional>
#include "equal.h"
#include "chain.h"

namespace bert_evaluation {
namespace {

const float* floats(const std::optional<at::Tensor>& tensor, int64_t size) {
  if (!tensor) return nullptr;
  TORCH_CHECK(tensor->scalar_type() == at::kFloat && tensor->numel() == size && tensor->is_contiguous(),
              "Scales, biases and weights of LayerNorm are float32, one number for each output.");
  return tensor->const_data_ptr<float>();
}

// Of slices: (panels, steps, slices, 16, 16, 4).
bool is_sliced(const at::Tensor& weight) { return weight.dim() == 6; }

using Given = const std::optional<at::Tensor>&;
using Some = c10::List<std::optional<at::Tensor>>;

// A linear, but for what it reads and writes.
Arguments checked(const at::Tensor& x, int64_t inputs, const at::Tensor& weight, Given scales, Given bias, int64_t outputs,
                  c10::string_view activation, Given norm_weight, Given norm_bias, double eps) {
  const auto kind = weight.scalar_type();
  const bool is_int8 = kind == at::kChar, is_float = x.scalar_type() == at::kFloat, sliced = is_sliced(weight);
  TORCH_CHECK(weight.is_contiguous() && (weight.dim() == 4 || sliced) && is_int8 == scales.has_value() &&
                  (is_int8 || kind == at::kBFloat16 || kind == at::kFloat) && (is_float || !(sliced || kind == at::kFloat)),
              "The weight is packed, in int8 with scales or without in bfloat16 or, for x in it too, float32.");
  TORCH_CHECK(is_int8 || kMultipliesBf16, "This processor multiplies no bfloat16.");
  const int64_t panels = up(outputs, 32) / 16, unit = is_int8 ? 64 : 32;
  TORCH_CHECK(sliced ? weight.sizes() == at::IntArrayRef({panels, up(inputs, unit) / unit, 3, 16, 16, 4})
                     : weight.size(0) == panels && weight.size(1) * weight.size(3) == up(inputs, unit) && weight.size(2) == 16 &&
                           weight.size(3) == 4 / (int64_t)weight.element_size(),
              "The weight is packed for other sizes.");
  Arguments of;
  of.inputs = of.stride = inputs;
  of.outputs = outputs;
  of.weight = (const char*)weight.const_data_ptr();
  of.scales = floats(scales, outputs);
  of.bias = floats(bias, outputs);
  of.norm_weight = floats(norm_weight, outputs);
  of.norm_bias = floats(norm_bias, outputs);
  of.activation = named(activation);
  of.eps = (float)eps;
  return of;
}

// What a chain of linears with weights of one kind makes of x; `residual` is added by those that say so.
at::Tensor computed(const at::Tensor& given, const at::Tensor& weight, Given residual, std::vector<Arguments>& chain) {
  // Rows may lie apart, as those of a part of something wider do; else they are copied.
  const at::Tensor x = given.stride(-1) == 1 && (given.is_contiguous() || given.dim() == 2) ? given : given.contiguous();
  Arguments &first = chain.front(), &last = chain.back();
  first.rows = x.numel() / first.inputs;
  first.stride = x.dim() == 2 ? x.stride(0) : first.inputs;
  first.x = x.const_data_ptr();
  auto sizes = x.sizes().vec();
  sizes.back() = last.outputs;
  const at::Tensor result = at::empty(sizes, x.options());
  last.result = result.data_ptr();
  at::Tensor added;
  if (residual) added = residual->contiguous();
  for (auto& each : chain) {
    if (each.added != 0) continue;
    sizes.back() = each.outputs;
    TORCH_CHECK(residual && added.sizes() == sizes && added.scalar_type() == x.scalar_type(),
                "What is added has the shape and the type of the result.");
    each.residual = added.const_data_ptr();
  }
  if (first.rows == 0) return result;
  const bool is_float = x.scalar_type() == at::kFloat;
#ifdef BERT_EVALUATION_HAS_AMX
  if (is_sliced(weight)) {
    Chain<Sliced, float>{chain}.run();
    return result;
  }
#endif
  if (weight.scalar_type() == at::kFloat) Chain<Float32, float>{chain}.run();
  else if (weight.scalar_type() == at::kChar) is_float ? Chain<Int8, float>{chain}.run() : Chain<Int8, bfloat16>{chain}.run();
  else is_float ? Chain<Bf16, float>{chain}.run() : Chain<Bf16, bfloat16>{chain}.run();
  return result;
}

// What this processor has no instructions for is computed in plain PyTorch, and so is x in float16.
bool takes(const at::Tensor& x, const at::Tensor& weight) {
  const bool able = is_sliced(weight) ? amx_allowed() : kMultipliesBf16 || weight.scalar_type() == at::kChar;
  return able && x.scalar_type() != at::kHalf;
}

void check(const at::Tensor& x) {
  TORCH_CHECK(x.dim() > 0 && x.size(-1) > 0, "x is of shape (..., inputs), with one input at least.");
  TORCH_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16, "x is float32 or bfloat16.");
}

at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, Given scales, Given bias, c10::SymInt outputs,
                  c10::string_view activation, Given residual, Given norm_weight, Given norm_bias, double eps) {
  if (!takes(x, weight)) {
    static const auto equal = in_plain_pytorch<decltype(linear)>("linear");
    return equal.call(x, weight, scales, bias, outputs, activation, residual, norm_weight, norm_bias, eps);
  }
  check(x);
  std::vector<Arguments> chain{checked(x, x.size(-1), weight, scales, bias, outputs.expect_int(), activation, norm_weight, norm_bias, eps)};
  if (residual) chain[0].added = 0;
  return computed(x, weight, residual, chain);
}

at::Tensor linears(const at::Tensor& x, const Some& tensors, at::IntArrayRef outputs, c10::string_view activations,
                   Given residual, at::IntArrayRef added, at::ArrayRef<double> eps) {
  constexpr size_t kOfEach = 5;
  const size_t count = outputs.size();
  TORCH_CHECK(count > 0 && tensors.size() == kOfEach * count && added.size() == count && eps.size() == count,
              "Of each linear there are five tensors, outputs, an activation, what it adds and eps.");
  const auto tensor = [&](size_t number, size_t which) -> std::optional<at::Tensor> { return tensors.get(kOfEach * number + which); };
  const auto weight_of = [&](size_t number) {
    const auto weight = tensor(number, 0);
    TORCH_CHECK(weight, "Each linear has a weight.");
    return *weight;
  };
  const at::Tensor first = weight_of(0);
  if (!takes(x, first)) {
    static const auto equal = in_plain_pytorch<decltype(linears)>("linears");
    return equal.call(x, tensors, outputs, activations, residual, added, eps);
  }
  check(x);
  std::vector<Arguments> chain;
  int64_t inputs = x.size(-1);
  for (size_t i = 0; i < count; i++) {
    const at::Tensor weight = weight_of(i);
    TORCH_CHECK(weight.scalar_type() == first.scalar_type() && weight.dim() == first.dim(), "The weights of a chain are of one kind.");
    TORCH_CHECK(added[i] <= (int64_t)i && (added[i] < 1 || outputs[added[i] - 1] == outputs[i]), "What is added was made before, and is as wide.");
    const size_t space = std::min(activations.find(' '), activations.size());
    chain.push_back(checked(x, inputs, weight, tensor(i, 1), tensor(i, 2), outputs[i], activations.substr(0, space), tensor(i, 3), tensor(i, 4), eps[i]));
    chain.back().added = added[i];
    activations.remove_prefix(std::min(space + 1, activations.size()));
    inputs = outputs[i];
  }
  return computed(x, first, residual, chain);
}

}  // namespace

TORCH_LIBRARY_IMPL(bert_evaluation, CPU, m) {
  m.impl("linear", linear);
  m.impl("linears", linears);
}

TORCH_LIBRARY_FRAGMENT(bert_evaluation, m) { m.def("has_amx() -> bool", amx_allowed); }

}  // namespace bert_evaluation

// The operator `bert_evaluation::linear`: its arguments checked, and the product that is computed for them.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>
#include <optional>
#include "equal.h"
#include "linear.h"

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

at::Tensor linear(const at::Tensor& given, const at::Tensor& weight, const std::optional<at::Tensor>& scales,
                  const std::optional<at::Tensor>& bias, int64_t outputs, c10::string_view activation,
                  const std::optional<at::Tensor>& residual, const std::optional<at::Tensor>& norm_weight,
                  const std::optional<at::Tensor>& norm_bias, double eps) {
  TORCH_CHECK(given.dim() > 0 && given.size(-1) > 0, "x is of shape (..., inputs), with one input at least.");
  // Rows may lie apart, as those of a part of something wider do; else they are copied.
  at::Tensor x = given.stride(-1) == 1 && (given.is_contiguous() || given.dim() == 2) ? given : given.contiguous();
  auto sizes = x.sizes().vec();
  Arguments of;
  of.inputs = sizes.back();
  of.rows = of.inputs ? x.numel() / of.inputs : 0;
  of.stride = x.dim() == 2 ? x.stride(0) : of.inputs;
  sizes.back() = of.outputs = outputs;
  at::Tensor result = at::empty(sizes, x.options()), added;
  if (residual) added = residual->contiguous();
  TORCH_CHECK(!residual || (added.sizes() == result.sizes() && added.scalar_type() == x.scalar_type()),
              "What is added has the shape and the type of the result.");
  of.x = x.const_data_ptr();
  of.weight = (const char*)weight.const_data_ptr();
  of.scales = floats(scales, outputs);
  of.bias = floats(bias, outputs);
  of.norm_weight = floats(norm_weight, outputs);
  of.norm_bias = floats(norm_bias, outputs);
  of.residual = residual ? added.const_data_ptr() : nullptr;
  of.result = result.data_ptr();
  of.activation = named(activation);
  of.eps = (float)eps;
  if (of.rows == 0) return result;
  const auto kind = weight.scalar_type();
  const bool is_int8 = kind == at::kChar, is_float = x.scalar_type() == at::kFloat, sliced = is_sliced(weight);
  TORCH_CHECK(is_float || x.scalar_type() == at::kBFloat16, "x is float32 or bfloat16.");
  TORCH_CHECK(weight.is_contiguous() && (weight.dim() == 4 || sliced) && is_int8 == scales.has_value() &&
                  (is_int8 || kind == at::kBFloat16 || kind == at::kFloat) && (is_float || !(sliced || kind == at::kFloat)),
              "The weight is packed, in int8 with scales or without in bfloat16 or, for x in it too, float32.");
  TORCH_CHECK(is_int8 || kMultipliesBf16, "This processor multiplies no bfloat16.");
  const int64_t panels = up(outputs, 32) / 16, unit = is_int8 ? 64 : 32;
  TORCH_CHECK(sliced ? weight.sizes() == at::IntArrayRef({panels, up(of.inputs, unit) / unit, 3, 16, 16, 4})
                     : weight.size(0) == panels && weight.size(1) * weight.size(3) == up(of.inputs, unit) && weight.size(2) == 16 &&
                           weight.size(3) == 4 / (int64_t)weight.element_size(),
              "The weight is packed for other sizes.");
#ifdef BERT_EVALUATION_HAS_AMX
  if (sliced) {
    Linear<Sliced, float>{of}.run();
    return result;
  }
#endif
  if (kind == at::kFloat) Linear<Float32, float>{of}.run();
  else if (is_int8) is_float ? Linear<Int8, float>{of}.run() : Linear<Int8, bfloat16>{of}.run();
  else is_float ? Linear<Bf16, float>{of}.run() : Linear<Bf16, bfloat16>{of}.run();
  return result;
}

// What this processor has no instructions for is computed in plain PyTorch, and so is x in float16.
at::Tensor linear_or_equal(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& scales,
                           const std::optional<at::Tensor>& bias, c10::SymInt outputs, c10::string_view activation,
                           const std::optional<at::Tensor>& residual, const std::optional<at::Tensor>& norm_weight,
                           const std::optional<at::Tensor>& norm_bias, double eps) {
  const bool able = is_sliced(weight) ? amx_allowed() : kMultipliesBf16 || weight.scalar_type() == at::kChar;
  if (able && x.scalar_type() != at::kHalf)
    return linear(x, weight, scales, bias, outputs.expect_int(), activation, residual, norm_weight, norm_bias, eps);
  static const auto equal = in_plain_pytorch<decltype(linear_or_equal)>("linear");
  return equal.call(x, weight, scales, bias, outputs, activation, residual, norm_weight, norm_bias, eps);
}

}  // namespace

TORCH_LIBRARY_IMPL(bert_evaluation, CPU, m) { m.impl("linear", linear_or_equal); }

TORCH_LIBRARY_FRAGMENT(bert_evaluation, m) { m.def("has_amx() -> bool", amx_allowed); }

}  // namespace bert_evaluation

// Our operators as C functions, as AOTInductor calls torch's own. Of others it looks up the schema at each call, copies
// that, and boxes the arguments, which takes as long as a small kernel.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/inductor/aoti_torch/utils.h>

namespace {

using at::Tensor;
using Given = const std::optional<Tensor>&;

template <class Signature> auto found(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

const Tensor& tensor(AtenTensorHandle handle) { return *torch::aot_inductor::tensor_handle_to_tensor_pointer(handle); }
std::optional<Tensor> tensor(AtenTensorHandle* handle) { return handle ? std::optional(tensor(*handle)) : std::nullopt; }

}  // namespace

extern "C" {

AOTITorchError aoti_torch_cpu_linear(AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle* scales, AtenTensorHandle* bias,
                                     int64_t outputs, const char* activation, AtenTensorHandle* residual,
                                     AtenTensorHandle* norm_weight, AtenTensorHandle* norm_bias, double eps, AtenTensorHandle* result) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    using Signature = Tensor(const Tensor&, const Tensor&, Given, Given, c10::SymInt, c10::string_view, Given, Given, Given, double);
    static const auto op = found<Signature>("bert_evaluation::linear");
    *result = torch::aot_inductor::new_tensor_handle(op.call(tensor(x), tensor(weight), tensor(scales), tensor(bias), outputs, activation,
                                                             tensor(residual), tensor(norm_weight), tensor(norm_bias), eps));
  });
}

AOTITorchError aoti_torch_cpu_attention(AtenTensorHandle query, AtenTensorHandle key, AtenTensorHandle value, AtenTensorHandle* mask,
                                        int64_t heads, double scale, AtenTensorHandle* result) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    using Signature = Tensor(const Tensor&, const Tensor&, const Tensor&, Given, c10::SymInt, double);
    static const auto op = found<Signature>("bert_evaluation::attention");
    *result = torch::aot_inductor::new_tensor_handle(op.call(tensor(query), tensor(key), tensor(value), tensor(mask), heads, scale));
  });
}

AOTITorchError aoti_torch_cpu_packed_attention(AtenTensorHandle query, AtenTensorHandle key, AtenTensorHandle value,
                                               AtenTensorHandle mask, int64_t heads, double scale, AtenTensorHandle* result) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    using Signature = Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, c10::SymInt, double);
    static const auto op = found<Signature>("bert_evaluation::packed_attention");
    *result = torch::aot_inductor::new_tensor_handle(op.call(tensor(query), tensor(key), tensor(value), tensor(mask), heads, scale));
  });
}

}  // extern "C"

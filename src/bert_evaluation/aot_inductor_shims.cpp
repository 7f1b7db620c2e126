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
std::optional<Tensor> tensor(const AtenTensorHandle* handle) { return handle ? std::optional(tensor(*handle)) : std::nullopt; }

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

AOTITorchError aoti_torch_cpu_linears(AtenTensorHandle x, const AtenTensorHandle** tensors, int64_t tensors_size, const int64_t* outputs,
                                      int64_t outputs_size, const char* activations, AtenTensorHandle* residual, const int64_t* added,
                                      int64_t added_size, const double* eps, int64_t eps_size, AtenTensorHandle* result) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    using Some = c10::List<std::optional<Tensor>>;
    using Signature = Tensor(const Tensor&, const Some&, at::IntArrayRef, c10::string_view, Given, at::IntArrayRef, at::ArrayRef<double>);
    static const auto op = found<Signature>("bert_evaluation::linears");
    Some read;
    read.reserve(tensors_size);
    for (int64_t i = 0; i < tensors_size; i++) read.push_back(tensor(tensors[i]));
    *result = torch::aot_inductor::new_tensor_handle(op.call(tensor(x), read, {outputs, (size_t)outputs_size}, activations, tensor(residual),
                                                             {added, (size_t)added_size}, {eps, (size_t)eps_size}));
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

// The twins of the operators, which are plain PyTorch: for what the kernels do not take.
#pragma once
#include <ATen/core/dispatch/Dispatcher.h>
#include <string>

namespace bert_evaluation {

template <class Signature> auto in_plain_pytorch(const char* name) {
  const std::string called = std::string("bert_evaluation::") + name + "_in_plain_pytorch";
  return c10::Dispatcher::singleton().findSchemaOrThrow(called.c_str(), "").template typed<Signature>();
}

}  // namespace bert_evaluation

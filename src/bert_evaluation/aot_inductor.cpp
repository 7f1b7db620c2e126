// A graph that AOTInductor has compiled, as a class for Python. torch's own holds Python's lock while it runs: then no
// other thread could answer another batch, and one that waits for its turn would keep the one that runs from going on.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/custom_class.h>
#include <torch/library.h>

namespace {

struct Library : torch::CustomClassHolder {
  std::unordered_map<std::string, at::Tensor> tensors;
  torch::inductor::AOTIModelPackageLoader loader;

  // So many calls run at once, others wait.
  Library(const std::string& package, int64_t at_once) : loader(package, "model", false, at_once) {}

  std::vector<std::string> names() { return loader.get_constant_fqns(); }

  // Tensors by those names. They are read where they lie, and kept.
  void read(const c10::Dict<std::string, at::Tensor>& named) {
    for (const auto& each : named) tensors.emplace(each.key(), each.value());
    loader.load_constants(tensors, /*use_inactive=*/false, /*check_full_update=*/true, /*user_managed=*/true);
  }

  std::vector<at::Tensor> run(std::vector<at::Tensor> inputs) { return loader.boxed_run(std::move(inputs)); }
};

struct Forward : c10::OperatorKernel {
  const c10::OperatorHandle to;
  explicit Forward(c10::OperatorHandle to) : to(std::move(to)) {}
  void operator()(const c10::OperatorHandle&, c10::DispatchKeySet, torch::jit::Stack* stack) { to.callBoxed(stack); }
};

// Let an operator of ours call another one, with what it is given. From Python, such a call would take its lock.
void forward(const std::string& name, const std::string& to, const std::string& overload) {
  static torch::Library library(torch::Library::IMPL, "bert_evaluation", c10::DispatchKey::CompositeExplicitAutograd, __FILE__, __LINE__);
  const auto found = c10::Dispatcher::singleton().findSchemaOrThrow(to.c_str(), overload.c_str());
  library.impl(name.c_str(), torch::CppFunction::makeFromBoxedFunctor(std::make_unique<Forward>(found)));
}

TORCH_LIBRARY_FRAGMENT(bert_evaluation, m) {
  m.def("forward(str name, str to, str overload) -> ()", forward);
  m.class_<Library>("Library")
      .def(torch::init<const std::string&, int64_t>())
      .def("names", &Library::names)
      .def("read", &Library::read)
      .def("run", &Library::run);
}

}  // namespace

// A graph that AOTInductor has compiled, as a class for Python. torch's own holds Python's lock while it runs: then no
// other thread could answer another batch, and one that waits for its turn would keep the one that runs from going on.
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/custom_class.h>

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

TORCH_LIBRARY_FRAGMENT(bert_evaluation, m) {
  m.class_<Library>("Library")
      .def(torch::init<const std::string&, int64_t>())
      .def("names", &Library::names)
      .def("read", &Library::read)
      .def("run", &Library::run);
}

}  // namespace

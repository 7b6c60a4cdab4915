// Module megatron_acodm._C: the operators' schemas. Importing it registers them, and the CPU
// kernels linked in beside; megatron_acodm/ops.py documents each and holds its PyTorch reference.

#include <Python.h>
#include <torch/library.h>

TORCH_LIBRARY(megatron_acodm, library) {
  library.def("domain_alignment(Tensor G) -> (Tensor W, Tensor sq_norm)");
  library.def("gram(Tensor G) -> Tensor");
  library.def("add_sketch_(Tensor(a!) row, Tensor grad, int key) -> ()");
  library.def("accumulate_domain_grad_(Tensor(a!) row, Tensor main_grad, Tensor(b!) seen) -> ()");
}

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT,
                               "_C",
                               "Operators of megatron_acodm",
                               -1,
                               nullptr,
                               nullptr,
                               nullptr,
                               nullptr,
                               nullptr};
  return PyModule_Create(&module);
}

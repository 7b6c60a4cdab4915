// Module megatron_acodm._C_cuda: the alignment operators on CUDA, on the current stream. Compiled
// only where torch is a CUDA build; the kernels themselves need no torch.

#include <ATen/ops/empty.h>
#include <Python.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../checks.h"
#include "alignment_kernels.cuh"

namespace megatron_acodm::cuda {
namespace {

int num_multiprocessors(const at::Tensor& tensor) {
  int count = 0;
  C10_CUDA_CHECK(
      cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, tensor.get_device()));
  return count;
}

std::tuple<at::Tensor, at::Tensor> domain_alignment_op(const at::Tensor& input) {
  check_alignment_input(input);
  const c10::cuda::CUDAGuard guard(input.device());
  const at::Tensor G = with_unit_stride(input);
  const int64_t num_rows = G.size(0), num_columns = G.size(1);
  const auto options = G.options().dtype(at::kDouble);
  at::Tensor W = at::empty({num_rows}, options), sq_norm = at::empty({num_rows}, options);
  const int64_t blocks = alignment_blocks(num_rows, num_columns, static_cast<int>(G.element_size()),
                                          num_multiprocessors(G));
  at::Tensor partial = at::empty({blocks, num_rows, 2}, options);
  const auto launch = [&](auto* data) {
    C10_CUDA_CHECK(
        domain_alignment(data, num_rows, num_columns, G.stride(0), blocks,
                         partial.mutable_data_ptr<double>(), W.mutable_data_ptr<double>(),
                         sq_norm.mutable_data_ptr<double>(), c10::cuda::getCurrentCUDAStream()));
  };
  if (G.scalar_type() == at::kFloat) {
    launch(G.const_data_ptr<float>());
  } else {
    launch(static_cast<const BFloat16Bits*>(G.const_data_ptr()));
  }
  return {W, sq_norm};
}

at::Tensor gram_op(const at::Tensor& input) {
  check_alignment_input(input);
  const c10::cuda::CUDAGuard guard(input.device());
  const at::Tensor G = with_unit_stride(input);
  const int64_t num_rows = G.size(0), blocks = gram_blocks(G.size(1));
  const auto options = G.options().dtype(at::kDouble);
  at::Tensor H = at::empty({num_rows, num_rows}, options);
  at::Tensor partial = at::empty({blocks, gram_partial_size(num_rows)}, options);
  const auto launch = [&](auto* data) {
    C10_CUDA_CHECK(gram(data, num_rows, G.size(1), G.stride(0), blocks,
                        partial.mutable_data_ptr<double>(), H.mutable_data_ptr<double>(),
                        c10::cuda::getCurrentCUDAStream()));
  };
  if (G.scalar_type() == at::kFloat) {
    launch(G.const_data_ptr<float>());
  } else {
    launch(static_cast<const BFloat16Bits*>(G.const_data_ptr()));
  }
  return H;
}

void add_sketch_op(at::Tensor& row, const at::Tensor& grad, int64_t key) {
  check_sketch_inputs(row, grad);
  const c10::cuda::CUDAGuard guard(row.device());
  const at::Tensor flat = grad.contiguous();
  const int64_t num_buckets = row.numel(), n = flat.numel();
  const int64_t runs = sketch_runs_needed(num_buckets, n, num_multiprocessors(row));
  at::Tensor partial = at::empty({runs, num_buckets}, row.options());
  const auto launch = [&](auto* data) {
    C10_CUDA_CHECK(add_sketch(row.mutable_data_ptr<float>(), num_buckets, data, n,
                              static_cast<uint64_t>(key), runs, partial.mutable_data_ptr<float>(),
                              c10::cuda::getCurrentCUDAStream()));
  };
  if (flat.scalar_type() == at::kFloat) {
    launch(flat.const_data_ptr<float>());
  } else {
    launch(static_cast<const BFloat16Bits*>(flat.const_data_ptr()));
  }
}

void accumulate_domain_grad_op(at::Tensor& row, const at::Tensor& main_grad, at::Tensor& seen) {
  check_growth_inputs(row, main_grad, seen);
  const c10::cuda::CUDAGuard guard(row.device());
  const auto launch = [&](auto* grad, auto* before) {
    C10_CUDA_CHECK(accumulate_growth(row.mutable_data_ptr<float>(), grad, before, row.numel(),
                                     num_multiprocessors(row), c10::cuda::getCurrentCUDAStream()));
  };
  if (main_grad.scalar_type() == at::kFloat) {
    launch(main_grad.const_data_ptr<float>(), seen.mutable_data_ptr<float>());
  } else {
    launch(static_cast<const BFloat16Bits*>(main_grad.const_data_ptr()),
           static_cast<BFloat16Bits*>(seen.mutable_data_ptr()));
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(megatron_acodm, CUDA, library) {
  library.impl("domain_alignment", &domain_alignment_op);
  library.impl("gram", &gram_op);
  library.impl("add_sketch_", &add_sketch_op);
  library.impl("accumulate_domain_grad_", &accumulate_domain_grad_op);
}

}  // namespace megatron_acodm::cuda

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C_cuda(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT,
                               "_C_cuda",
                               "CUDA kernels of megatron_acodm",
                               -1,
                               nullptr,
                               nullptr,
                               nullptr,
                               nullptr,
                               nullptr};
  return PyModule_Create(&module);
}

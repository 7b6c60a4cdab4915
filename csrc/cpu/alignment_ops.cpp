// The alignment operators on the CPU: tensors in, raw pointers to the kernels, threads over chunks.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <vector>

#include "../checks.h"
#include "alignment_kernels.h"

namespace megatron_acodm::cpu {
namespace {

// Below so many elements a thread's start costs more than it saves.
constexpr int64_t kElementsPerThread = 32768;

template <typename T>
std::vector<double> all_sums(const T* G, int64_t num_rows, int64_t num_columns,
                             int64_t row_stride) {
  const AlignmentPlan plan = plan_alignment(num_rows, num_columns);
  const int64_t width = 2 * num_rows;
  std::vector<double> partial(plan.num_chunks * width);
  const int64_t grain = std::max<int64_t>(1, kElementsPerThread / (num_rows * plan.chunk));
  at::parallel_for(0, plan.num_chunks, grain, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk) {
      const int64_t begin = chunk * plan.chunk;
      const int64_t end = std::min(num_columns, begin + plan.chunk);
      alignment_sums(G, num_rows, row_stride, begin, end, plan.tile,
                     partial.data() + chunk * width);
    }
  });
  std::vector<double> sums(width);
  for (int64_t chunk = 0; chunk < plan.num_chunks; ++chunk) {  // in order: reproducible
    for (int64_t i = 0; i < width; ++i) sums[i] += partial[chunk * width + i];
  }
  return sums;
}

std::tuple<at::Tensor, at::Tensor> domain_alignment(const at::Tensor& input) {
  check_alignment_input(input);
  const at::Tensor G = with_unit_stride(input);
  const int64_t num_rows = G.size(0);
  const std::vector<double> sums =
      G.scalar_type() == at::kFloat
          ? all_sums(G.const_data_ptr<float>(), num_rows, G.size(1), G.stride(0))
          : all_sums(static_cast<const BFloat16Bits*>(G.const_data_ptr()), num_rows, G.size(1),
                     G.stride(0));
  at::Tensor W = at::empty({num_rows}, G.options().dtype(at::kDouble));
  at::Tensor sq_norm = at::empty({num_rows}, W.options());
  for (int64_t i = 0; i < num_rows; ++i) {
    W.mutable_data_ptr<double>()[i] = sums[2 * i];
    sq_norm.mutable_data_ptr<double>()[i] = sums[2 * i + 1];
  }
  return {W, sq_norm};
}

template <typename T>
void accumulate_all(float* row, const T* main_grad, T* seen, int64_t n) {
  at::parallel_for(0, n, kElementsPerThread, [&](int64_t begin, int64_t end) {
    accumulate_growth(row + begin, main_grad + begin, seen + begin, end - begin);
  });
}

void accumulate_domain_grad_(at::Tensor& row, const at::Tensor& main_grad, at::Tensor& seen) {
  check_growth_inputs(row, main_grad, seen);
  float* target = row.mutable_data_ptr<float>();
  const int64_t n = row.numel();
  if (main_grad.scalar_type() == at::kFloat) {
    accumulate_all(target, main_grad.const_data_ptr<float>(), seen.mutable_data_ptr<float>(), n);
  } else {
    accumulate_all(target, static_cast<const BFloat16Bits*>(main_grad.const_data_ptr()),
                   static_cast<BFloat16Bits*>(seen.mutable_data_ptr()), n);
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(megatron_acodm, CPU, library) {
  library.impl("domain_alignment", &domain_alignment);
  library.impl("accumulate_domain_grad_", &accumulate_domain_grad_);
}

}  // namespace megatron_acodm::cpu

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
constexpr int64_t kMaxSketchRuns = 8;
constexpr int64_t kMinSketchBlocks = 8;

// Calls kernel(begin, end, tile, sums) for every chunk of columns and adds up its width sums.
template <typename Kernel>
std::vector<double> sum_chunks(const AlignmentPlan& plan, int64_t num_rows, int64_t num_columns,
                               int64_t width, const Kernel& kernel) {
  std::vector<double> partial(plan.num_chunks * width);
  const int64_t grain = std::max<int64_t>(1, kElementsPerThread / (num_rows * plan.chunk));
  at::parallel_for(0, plan.num_chunks, grain, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk) {
      const int64_t begin = chunk * plan.chunk;
      const int64_t end = std::min(num_columns, begin + plan.chunk);
      kernel(begin, end, plan.tile, partial.data() + chunk * width);
    }
  });
  std::vector<double> sums(width);
  for (int64_t chunk = 0; chunk < plan.num_chunks; ++chunk) {  // in order: reproducible
    for (int64_t i = 0; i < width; ++i) sums[i] += partial[chunk * width + i];
  }
  return sums;
}

// Calls use(pointer) with a pointer to the numbers of a float32 or bfloat16 tensor.
template <typename Use>
auto with_data(const at::Tensor& tensor, const Use& use) {
  return tensor.scalar_type() == at::kFloat
             ? use(tensor.const_data_ptr<float>())
             : use(static_cast<const BFloat16Bits*>(tensor.const_data_ptr()));
}

std::tuple<at::Tensor, at::Tensor> domain_alignment(const at::Tensor& input) {
  check_alignment_input(input);
  const at::Tensor G = with_unit_stride(input);
  const int64_t num_rows = G.size(0), num_columns = G.size(1);
  const std::vector<double> sums = with_data(G, [&](const auto* data) {
    return sum_chunks(plan_alignment(num_rows, num_columns), num_rows, num_columns, 2 * num_rows,
                      [&](int64_t begin, int64_t end, int64_t tile, double* out) {
                        alignment_sums(data, num_rows, G.stride(0), begin, end, tile, out);
                      });
  });
  at::Tensor W = at::empty({num_rows}, G.options().dtype(at::kDouble));
  at::Tensor sq_norm = at::empty({num_rows}, W.options());
  for (int64_t i = 0; i < num_rows; ++i) {
    W.mutable_data_ptr<double>()[i] = sums[2 * i];
    sq_norm.mutable_data_ptr<double>()[i] = sums[2 * i + 1];
  }
  return {W, sq_norm};
}

at::Tensor gram(const at::Tensor& input) {
  check_alignment_input(input);
  const at::Tensor G = with_unit_stride(input);
  const int64_t num_rows = G.size(0), num_columns = G.size(1);
  const std::vector<double> products = with_data(G, [&](const auto* data) {
    return sum_chunks(plan_gram(num_rows, num_columns), num_rows, num_columns,
                      num_gram_products(num_rows),
                      [&](int64_t begin, int64_t end, int64_t tile, double* out) {
                        gram_products(data, num_rows, G.stride(0), begin, end, tile, out);
                      });
  });
  at::Tensor H = at::empty({num_rows, num_rows}, G.options().dtype(at::kDouble));
  double* target = H.mutable_data_ptr<double>();
  const double* product = products.data();
  for (int64_t a = 0; a < num_rows; a += 4) {
    for (int64_t b = a; b < num_rows; b += 4, product += 16) {
      for (int64_t i = a; i < std::min(a + 4, num_rows); ++i) {
        for (int64_t j = std::max(b, i); j < std::min(b + 4, num_rows); ++j) {
          const double value = product[4 * (i - a) + j - b];
          target[i * num_rows + j] = target[j * num_rows + i] = value;
        }
      }
    }
  }
  return H;
}

void add_sketch_(at::Tensor& row, const at::Tensor& grad, int64_t key) {
  check_sketch_inputs(row, grad);
  const at::Tensor flat = grad.contiguous();
  const int64_t num_buckets = row.numel(), n = flat.numel();
  if (n == 0) return;
  float* target = row.mutable_data_ptr<float>();
  const int64_t blocks = (n + num_buckets - 1) / num_buckets;
  // A run of blocks should outweigh its row, and a thread's start.
  int64_t runs = 1;
  while (runs < kMaxSketchRuns && blocks / (2 * runs) >= kMinSketchBlocks &&
         n / (2 * runs) >= kElementsPerThread) {
    runs *= 2;
  }
  std::vector<float> rows((runs - 1) * num_buckets);  // the first run has the target's own
  with_data(flat, [&](const auto* data) {
    at::parallel_for(0, runs, 1, [&](int64_t first, int64_t last) {
      for (int64_t run = first; run < last; ++run) {
        float* own = run == 0 ? target : rows.data() + (run - 1) * num_buckets;
        add_sketch(own, num_buckets, data, n, static_cast<uint64_t>(key), run * blocks / runs,
                   (run + 1) * blocks / runs);
      }
    });
  });
  for (int64_t run = 1; run < runs; ++run) {
    const float* own = rows.data() + (run - 1) * num_buckets;
    for (int64_t bucket = 0; bucket < num_buckets; ++bucket) target[bucket] += own[bucket];
  }
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
  library.impl("gram", &gram);
  library.impl("add_sketch_", &add_sketch_);
  library.impl("accumulate_domain_grad_", &accumulate_domain_grad_);
}

}  // namespace megatron_acodm::cpu

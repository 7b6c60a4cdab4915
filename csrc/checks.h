// What the operators ask of their arguments, the same on every device; megatron_acodm/ops.py asks
// the same of what reaches the reference.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

#include "hash.h"

namespace megatron_acodm {

constexpr int64_t kMaxDomains = 256;
constexpr int64_t kMaxBuckets = int64_t{1} << 30;

inline void check_alignment_input(const at::Tensor& G) {
  TORCH_CHECK_VALUE(G.dim() == 2, "G has shape ", G.sizes(), "; it must be [domains, numbers]");
  TORCH_CHECK_VALUE(G.size(0) >= 1 && G.size(0) <= kMaxDomains, "G has ", G.size(0), " rows; 1 to ",
                    kMaxDomains, " domains are supported");
  TORCH_CHECK_VALUE(G.scalar_type() == at::kFloat || G.scalar_type() == at::kBFloat16, "G is of ",
                    G.dtype(), "; it must be float32 or bfloat16");
}

// Of contiguous tensors.
inline bool overlap(const at::Tensor& a, const at::Tensor& b) {
  const auto* a_begin = static_cast<const char*>(a.const_data_ptr());
  const auto* b_begin = static_cast<const char*>(b.const_data_ptr());
  return a_begin < b_begin + b.nbytes() && b_begin < a_begin + a.nbytes();
}

inline void check_growth_inputs(const at::Tensor& row, const at::Tensor& main_grad,
                                const at::Tensor& seen) {
  TORCH_CHECK_VALUE(row.scalar_type() == at::kFloat, "row is of ", row.scalar_type(),
                    "; it must be float32");
  TORCH_CHECK_VALUE(
      main_grad.scalar_type() == at::kFloat || main_grad.scalar_type() == at::kBFloat16,
      "main_grad is of ", main_grad.scalar_type(), "; it must be float32 or bfloat16");
  TORCH_CHECK_VALUE(seen.scalar_type() == main_grad.scalar_type(), "seen is of ",
                    seen.scalar_type(), " and main_grad of ", main_grad.scalar_type(),
                    "; they must be alike");
  TORCH_CHECK_VALUE(row.numel() == main_grad.numel() && seen.numel() == main_grad.numel(),
                    "row, main_grad and seen hold ", row.numel(), ", ", main_grad.numel(), " and ",
                    seen.numel(), " numbers; they must hold equally many");
  TORCH_CHECK_VALUE(row.device() == main_grad.device() && seen.device() == main_grad.device(),
                    "row, main_grad and seen lie on ", row.device(), ", ", main_grad.device(),
                    " and ", seen.device(), "; they must lie on one device");
  TORCH_CHECK_VALUE(row.is_contiguous() && main_grad.is_contiguous() && seen.is_contiguous(),
                    "row, main_grad and seen must be contiguous; pass views of flat buffers");
  TORCH_CHECK_VALUE(
      !overlap(row, main_grad) && !overlap(row, seen) && !overlap(seen, main_grad),
      "row, main_grad and seen share memory; seen must be a copy of main_grad, not a view");
}

inline void check_sketch_inputs(const at::Tensor& row, const at::Tensor& grad) {
  TORCH_CHECK_VALUE(row.scalar_type() == at::kFloat, "row is of ", row.scalar_type(),
                    "; it must be float32");
  TORCH_CHECK_VALUE(grad.scalar_type() == at::kFloat || grad.scalar_type() == at::kBFloat16,
                    "grad is of ", grad.scalar_type(), "; it must be float32 or bfloat16");
  TORCH_CHECK_VALUE(row.dim() == 1 && row.numel() > 0 && row.numel() % kWordBuckets == 0 &&
                        row.numel() <= kMaxBuckets,
                    "row has shape ", row.sizes(), "; it must be flat, a multiple of ",
                    kWordBuckets, " numbers, ", kMaxBuckets, " at most");
  TORCH_CHECK_VALUE(row.is_contiguous(), "row must be contiguous");
  TORCH_CHECK_VALUE(row.device() == grad.device(), "row and grad lie on ", row.device(), " and ",
                    grad.device(), "; they must lie on one device");
  TORCH_CHECK_VALUE(!grad.is_contiguous() || !overlap(row, grad),
                    "row and grad share memory; give the sketch a row of its own");
}

// G with the elements of a row side by side, as the kernels read it; copied only if they are not.
inline at::Tensor with_unit_stride(const at::Tensor& G) {
  return G.stride(1) == 1 || G.size(1) <= 1 ? G : G.contiguous();
}

}  // namespace megatron_acodm

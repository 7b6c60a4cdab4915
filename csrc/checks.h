// What the operators ask of their arguments, the same on every device. The messages match those
// of megatron_acodm/ops.py, which checks what reaches the reference.
#pragma once

#include <ATen/MemoryOverlap.h>
#include <ATen/core/Tensor.h>

#include <tuple>

namespace megatron_acodm {

constexpr int64_t kMaxDomains = 256;

inline void check_alignment_input(const at::Tensor& G) {
  TORCH_CHECK_VALUE(G.dim() == 2, "G has shape ", G.sizes(), "; it must be [domains, numbers]");
  TORCH_CHECK_VALUE(G.size(0) >= 1 && G.size(0) <= kMaxDomains, "G has ", G.size(0),
                    " rows; 1 to ", kMaxDomains, " domains are supported");
  TORCH_CHECK_VALUE(G.scalar_type() == at::kFloat || G.scalar_type() == at::kBFloat16,
                    "G is of ", G.dtype(), "; it must be float32 or bfloat16");
}

inline void check_growth_inputs(const at::Tensor& row, const at::Tensor& main_grad,
                                const at::Tensor& seen) {
  TORCH_CHECK_VALUE(row.scalar_type() == at::kFloat, "row is of ", row.dtype(),
                    "; it must be float32");
  TORCH_CHECK_VALUE(
      main_grad.scalar_type() == at::kFloat || main_grad.scalar_type() == at::kBFloat16,
      "main_grad is of ", main_grad.dtype(), "; it must be float32 or bfloat16");
  TORCH_CHECK_VALUE(seen.scalar_type() == main_grad.scalar_type(), "seen is of ", seen.dtype(),
                    " and main_grad of ", main_grad.dtype(), "; they must be alike");
  TORCH_CHECK_VALUE(row.numel() == main_grad.numel() && seen.numel() == main_grad.numel(),
                    "row, main_grad and seen hold ", row.numel(), ", ", main_grad.numel(), " and ",
                    seen.numel(), " numbers; they must hold equally many");
  TORCH_CHECK_VALUE(row.device() == main_grad.device() && seen.device() == main_grad.device(),
                    "row, main_grad and seen lie on ", row.device(), ", ", main_grad.device(),
                    " and ", seen.device(), "; they must lie on one device");
  TORCH_CHECK_VALUE(row.is_contiguous() && main_grad.is_contiguous() && seen.is_contiguous(),
                    "row, main_grad and seen must be contiguous; pass views of flat buffers");
  at::assert_no_overlap(row, main_grad);
  at::assert_no_overlap(row, seen);
  at::assert_no_overlap(seen, main_grad);
}

// G with the elements of a row side by side, as the kernels read it; copied only if they are not.
inline at::Tensor with_unit_stride(const at::Tensor& G) {
  return G.stride(1) == 1 || G.size(1) <= 1 ? G : G.contiguous();
}

}  // namespace megatron_acodm

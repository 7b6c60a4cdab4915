// What the CUDA kernels share: elements, packs of them, and sums over a warp.
#pragma once

#include "alignment_kernels.cuh"

namespace megatron_acodm::cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(BFloat16Bits value) {
  return __uint_as_float(static_cast<uint32_t>(value.bits) << 16);
}

}  // namespace megatron_acodm::cuda

// The sketch on CUDA: csrc/cpu/sketch.h says what it is. A thread owns a bucket and takes a run of
// blocks in order, so neighbouring threads read neighbouring numbers and write neighbouring buckets
// without atomics. Runs are added up afterwards, in order.
#pragma once

#include <algorithm>

#include "../hash.h"
#include "common.cuh"

namespace megatron_acodm::cuda {

// Most runs that the blocks of a gradient are cut into; bounds the partial sums.
constexpr int64_t kMaxRuns = 64;

// partial[run, bucket] = sum of the run's numbers that fall into the bucket.
//
// The 32 buckets of a warp lie in one half of a word. Each lane computes the shift and the half of
// another block of the run; the warp then hands them around, 32 blocks for one hash a thread.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    sketch_runs(const T* __restrict__ g, int64_t n, uint64_t key, int num_buckets,
                int64_t blocks_per_run, float* __restrict__ partial) {
  const int bucket = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  if (bucket - static_cast<int>(threadIdx.x % 32) >= num_buckets) return;  // of whole warps
  const int lane = threadIdx.x % 32;
  const uint64_t state = mixed(key);
  const int64_t blocks = (n + num_buckets - 1) / num_buckets;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * blocks_per_run;
  const int64_t last = first + blocks_per_run < blocks ? first + blocks_per_run : blocks;
  float sum = 0;
  for (int64_t base = first; base < last; base += 32) {
    const uint64_t block_state = random_word(state, base + lane);
    const int own_shift = static_cast<int>(block_shift(block_state, num_buckets));
    const uint64_t word = random_word(block_state, bucket / kWordBuckets);
    const uint32_t own_signs = static_cast<uint32_t>(word >> (bucket & 32));
    const int count = last - base < 32 ? static_cast<int>(last - base) : 32;
#pragma unroll 8
    for (int i = 0; i < count; ++i) {
      const int shift = __shfl_sync(0xffffffffu, own_shift, i);
      const uint32_t signs = __shfl_sync(0xffffffffu, own_signs, i);
      const int offset = bucket - shift + (bucket < shift ? num_buckets : 0);
      const int64_t index = (base + i) * num_buckets + offset;
      const float value = index < n ? to_float(g[index]) : 0.0f;
      sum += __uint_as_float(__float_as_uint(value) ^ ((signs << (31 - lane)) & 0x80000000u));
    }
  }
  partial[static_cast<int64_t>(blockIdx.y) * num_buckets + bucket] = sum;
}

// row[bucket] += partial[0, bucket] + partial[1, bucket] + ...
__global__ void __launch_bounds__(kThreads)
    add_runs(const float* __restrict__ partial, int num_runs, int num_buckets,
             float* __restrict__ row) {
  const int bucket = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  if (bucket >= num_buckets) return;
  float sum = row[bucket];
#pragma unroll 4
  for (int run = 0; run < num_runs; ++run) {
    sum += partial[static_cast<int64_t>(run) * num_buckets + bucket];
  }
  row[bucket] = sum;
}

template <typename T>
cudaError_t launch_sketch(float* row, int64_t num_buckets, const T* g, int64_t n, uint64_t key,
                          int64_t runs, float* partial, cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  const int64_t blocks = (n + num_buckets - 1) / num_buckets;
  const dim3 grid(static_cast<unsigned>((num_buckets + kThreads - 1) / kThreads),
                  static_cast<unsigned>(runs));
  sketch_runs<T><<<grid, kThreads, 0, stream>>>(g, n, key, static_cast<int>(num_buckets),
                                                (blocks + runs - 1) / runs, partial);
  add_runs<<<grid.x, kThreads, 0, stream>>>(partial, static_cast<int>(runs),
                                            static_cast<int>(num_buckets), row);
  return cudaGetLastError();
}

}  // namespace megatron_acodm::cuda

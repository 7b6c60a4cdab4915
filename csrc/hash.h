// The random numbers of the gradient sketch: a function of a key and a position, the same on every
// device. megatron_acodm/ops.py spells it out once more in PyTorch.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define ACODM_SHARED __host__ __device__ __forceinline__
#else
#define ACODM_SHARED inline __attribute__((always_inline))
#endif

namespace megatron_acodm {

// Buckets whose signs are the bits of one word.
constexpr int64_t kWordBuckets = 64;

// The finalizer of SplitMix64: a bijection in which every bit of x moves every bit of the result.
ACODM_SHARED uint64_t mixed(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// The index-th number of the SplitMix64 generator that starts from a state.
ACODM_SHARED uint64_t random_word(uint64_t state, int64_t index) {
  return mixed(state + 0x9e3779b97f4a7c15u * (static_cast<uint64_t>(index) + 1));
}

// Where the first number of a block falls, uniform over [0, num_buckets).
ACODM_SHARED int64_t block_shift(uint64_t block_state, int64_t num_buckets) {
  return static_cast<int64_t>(((block_state >> 32) * static_cast<uint64_t>(num_buckets)) >> 32);
}

}  // namespace megatron_acodm

// Body of the sketch on the CPU: signed folding of a flat gradient into buckets.
//
// The gradient is cut into blocks of num_buckets numbers. Each block is rotated by a random shift,
// multiplied by random signs and added to the row, so that any two numbers of different blocks
// share a bucket with probability 1 / num_buckets, whatever the pattern of the large ones: without
// the shift, a large column of a weight whose width is a multiple of num_buckets would fall into
// one bucket. Two of one block never share one.
//
// A thread takes a run of blocks, whose numbers lie one after the other in memory, and adds them to
// a row of its own; how many runs there are depends on the shape alone, so sums do not depend on
// the number of threads. Threads that share out the buckets instead need no rows of their own, but
// read memory in pieces: half as fast where the gradient does not fit a cache.
#pragma once

#include <algorithm>

#include "../hash.h"
#include "lanes.h"

namespace megatron_acodm::cpu {

// How far ahead of what is added memory is asked for; the hardware alone stops at each page.
constexpr int64_t kPrefetchBytes = 12 * 1024;

// bucket[i] += +-g[i] for the kWordBuckets buckets of a word; bit i of signs flips g[i].
template <int WIDTH, typename T>
ACODM_INLINE void add_word(float* bucket, const T* g, uint64_t signs) {
  using L = Lanes<WIDTH>;
  for (int64_t i = 0; i < kWordBuckets; i += kLanes) {
    L sum = L::load(bucket + i), value = L::load(g + i);
    value.flip_signs(static_cast<uint32_t>(signs >> (i & 32)), i & 16);
    sum += value;
    sum.store(bucket + i);
  }
}

// Buckets [begin, end) of a block receive source[begin, end).
template <int WIDTH, typename T>
ACODM_INLINE void add_range(float* row, const T* source, int64_t begin, int64_t end,
                            uint64_t block_state) {
  for (int64_t bucket = begin; bucket < end;) {
    const int64_t word = bucket / kWordBuckets;
    const int64_t start = word * kWordBuckets;
    const int64_t next = std::min(end, start + kWordBuckets);
    const uint64_t signs = random_word(block_state, word);
    if (next - bucket == kWordBuckets) {
      const auto* ahead = reinterpret_cast<const char*>(source + start) + kPrefetchBytes;
      for (uint64_t byte = 0; byte < kWordBuckets * sizeof(T); byte += 64) {
        __builtin_prefetch(ahead + byte);
      }
      add_word<WIDTH>(row + start, source + start, signs);
    } else {  // the ends of a range, padded to a word
      T padded[kWordBuckets] = {};
      std::copy(source + bucket, source + next, padded + (bucket - start));
      add_word<WIDTH>(row + start, padded, signs);
    }
    bucket = next;
  }
}

template <int WIDTH, typename T>
ACODM_INLINE void sketch_body(float* row, int64_t num_buckets, const T* g, int64_t n, uint64_t key,
                              int64_t first_block, int64_t last_block) {
  const uint64_t state = mixed(key);
  for (int64_t block = first_block; block < last_block; ++block) {
    const uint64_t block_state = random_word(state, block);
    const int64_t shift = block_shift(block_state, num_buckets);
    const int64_t first = block * num_buckets;
    const int64_t end = shift + std::min(num_buckets, n - first);
    const T* source = g + first - shift;  // of bucket 0, for buckets from the shift on
    add_range<WIDTH>(row, source, shift, std::min(num_buckets, end), block_state);
    add_range<WIDTH>(row, source + num_buckets, 0, end - num_buckets, block_state);
  }
}

}  // namespace megatron_acodm::cpu

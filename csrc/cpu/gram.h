// Body of the Gram matrix on the CPU: tiles of columns are packed into cache as float32, and
// groups of rows are multiplied with groups of rows there. Memory is read once.
#pragma once

#include <algorithm>
#include <vector>

#include "lanes.h"

namespace megatron_acodm::cpu {

constexpr int64_t kGramRows = 4;  // of a group
constexpr int64_t kGramProducts = kGramRows * kGramRows;
constexpr int64_t kPacked = 2 * kLanes;  // columns packed at once; LanesPair shuffles bfloat16

inline int64_t gram_groups(int64_t num_rows) { return (num_rows + kGramRows - 1) / kGramRows; }

// Pairs of groups (a, b) with a <= b, in the order in which their products lie.
inline int64_t gram_pairs(int64_t num_rows) {
  return gram_groups(num_rows) * (gram_groups(num_rows) + 1) / 2;
}

// Lane sums of the products of each row of a with each row of b, over n columns.
template <int WIDTH>
ACODM_INLINE void multiply_groups(const float* a, const float* b, int64_t stride, int64_t n,
                                  float* lane_sums) {
  using Vector = typename VectorTypes<WIDTH>::Float;
  // As many sums as this target has registers for.
  constexpr int64_t kColumns = WIDTH == 16 ? kGramRows : 2;
  for (int64_t lane = 0; lane < kLanes; lane += WIDTH) {
    for (int64_t j = 0; j < kGramRows; j += kColumns) {
      Vector sums[kGramRows][kColumns];
      for (int64_t i = 0; i < kGramRows; ++i) {
        for (int64_t k = 0; k < kColumns; ++k) {
          std::memcpy(&sums[i][k], lane_sums + (i * kGramRows + j + k) * kLanes + lane,
                      sizeof(Vector));
        }
      }
      for (int64_t column = lane; column < n; column += kLanes) {
        Vector right[kColumns];
        for (int64_t k = 0; k < kColumns; ++k) {
          std::memcpy(&right[k], b + (j + k) * stride + column, sizeof(Vector));
        }
        for (int64_t i = 0; i < kGramRows; ++i) {
          Vector left;
          std::memcpy(&left, a + i * stride + column, sizeof(Vector));
          for (int64_t k = 0; k < kColumns; ++k) sums[i][k] += left * right[k];
        }
      }
      for (int64_t i = 0; i < kGramRows; ++i) {
        for (int64_t k = 0; k < kColumns; ++k) {
          std::memcpy(lane_sums + (i * kGramRows + j + k) * kLanes + lane, &sums[i][k],
                      sizeof(Vector));
        }
      }
    }
  }
}

// n columns of all rows as float32, and zeros up to a multiple of kPacked. Rows past the last stay
// zero.
template <int WIDTH, typename T>
ACODM_INLINE void pack_tile(const T* G, int64_t num_rows, int64_t row_stride, int64_t n,
                            float* packed, int64_t stride) {
  using Pair = LanesPair<WIDTH>;
  for (int64_t row = 0; row < num_rows; ++row) {
    const T* source = G + row * row_stride;
    float* target = packed + row * stride;
    const int64_t whole = n / kPacked * kPacked;
    for (int64_t column = 0; column < whole; column += kPacked) {
      Pair::load(source + column).store(target + column);
    }
    if (whole < n) {
      T padded[kPacked] = {};
      std::copy(source + whole, source + n, padded);
      Pair::load(padded).store(target + whole);
    }
  }
}

template <int WIDTH, typename T>
ACODM_INLINE void gram_body(const T* G, int64_t num_rows, int64_t row_stride, int64_t begin,
                            int64_t end, int64_t tile, double* sums) {
  const int64_t groups = gram_groups(num_rows);
  // Rows an odd number of cache lines apart do not compete for the same places in the cache.
  const int64_t stride = tile + kLanes, group_stride = kGramRows * stride;
  std::vector<float> buffer(groups * group_stride + kLanes);
  float* packed = buffer.data();
  while (reinterpret_cast<uintptr_t>(packed) % (4 * kLanes) != 0) ++packed;
  const int64_t num_products = gram_pairs(num_rows) * kGramProducts;
  std::vector<float> lane_sums(num_products * kLanes);
  std::fill(sums, sums + num_products, 0.0);

  int64_t unflushed = 0;
  for (int64_t column = begin; column < end; column += tile) {
    const int64_t n = std::min(tile, end - column);
    pack_tile<WIDTH>(G + column, num_rows, row_stride, n, packed, stride);
    float* lanes = lane_sums.data();
    for (int64_t a = 0; a < groups; ++a) {
      for (int64_t b = a; b < groups; ++b, lanes += kGramProducts * kLanes) {
        multiply_groups<WIDTH>(packed + a * group_stride, packed + b * group_stride, stride,
                               (n + kPacked - 1) / kPacked * kPacked, lanes);
      }
    }
    unflushed += n;
    if (unflushed < kFlushColumns && column + tile < end) continue;
    for (int64_t i = 0; i < num_products; ++i) {
      double sum = 0;
      for (int64_t lane = 0; lane < kLanes; ++lane) sum += lane_sums[i * kLanes + lane];
      sums[i] += sum;
    }
    std::fill(lane_sums.begin(), lane_sums.end(), 0.0f);
    unflushed = 0;
  }
}

}  // namespace megatron_acodm::cpu

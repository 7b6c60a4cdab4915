// CPU kernels of the alignment operators, on raw pointers: no torch header, so that they compile
// in a second and can be read, tested and reused alone.
#pragma once

#include <cstdint>

namespace megatron_acodm::cpu {

// The bits of a bfloat16: the upper half of a float32.
struct BFloat16Bits {
  uint16_t bits;
};

// How the columns of a [K, P] matrix are cut. It depends on K and P alone, never on the number of
// threads: that makes the sums below reproducible.
struct AlignmentPlan {
  int64_t tile;        // columns whose K rows stay in cache between the two visits
  int64_t chunk;       // columns of one unit of work, a multiple of tile
  int64_t num_chunks;  // ceil(P / chunk)
};

AlignmentPlan plan_alignment(int64_t num_rows, int64_t num_columns);

// Over the columns [begin, end) of G: sums[2 i] = <G_i, sum_{j != i} G_j>, sums[2 i + 1] =
// ||G_i||^2, for each of num_rows rows. Rows lie row_stride elements apart, their elements
// side by side. Memory is read once; the second visit of a tile hits the cache.
void alignment_sums(const float* G, int64_t num_rows, int64_t row_stride, int64_t begin,
                    int64_t end, int64_t tile, double* sums);
void alignment_sums(const BFloat16Bits* G, int64_t num_rows, int64_t row_stride, int64_t begin,
                    int64_t end, int64_t tile, double* sums);

// row += main_grad - seen; seen = main_grad; over n elements, in one pass.
void accumulate_growth(float* row, const float* main_grad, float* seen, int64_t n);
void accumulate_growth(float* row, const BFloat16Bits* main_grad, BFloat16Bits* seen, int64_t n);

}  // namespace megatron_acodm::cpu

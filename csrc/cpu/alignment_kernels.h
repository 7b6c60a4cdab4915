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

// The same for gram_products; a chunk's sums are kept for every pair of rows, so chunks are few.
AlignmentPlan plan_gram(int64_t num_rows, int64_t num_columns);

// Numbers that gram_products writes: the rows, in groups of 4 with zeros past the last, make
// pairs of groups (0, 0), (0, 1), ..., (1, 1), ...; each pair has 4 x 4 products.
int64_t num_gram_products(int64_t num_rows);

// Products of every row with every other over the columns [begin, end) of G.
void gram_products(const float* G, int64_t num_rows, int64_t row_stride, int64_t begin,
                   int64_t end, int64_t tile, double* products);
void gram_products(const BFloat16Bits* G, int64_t num_rows, int64_t row_stride, int64_t begin,
                   int64_t end, int64_t tile, double* products);

// Adds the sketch of the blocks [first_block, last_block) of num_buckets numbers, of the n numbers
// of g, to a row; num_buckets is a multiple of 64. See sketch.h.
void add_sketch(float* row, int64_t num_buckets, const float* g, int64_t n, uint64_t key,
                int64_t first_block, int64_t last_block);
void add_sketch(float* row, int64_t num_buckets, const BFloat16Bits* g, int64_t n, uint64_t key,
                int64_t first_block, int64_t last_block);

// row += main_grad - seen; seen = main_grad; over n elements, in one pass.
void accumulate_growth(float* row, const float* main_grad, float* seen, int64_t n);
void accumulate_growth(float* row, const BFloat16Bits* main_grad, BFloat16Bits* seen, int64_t n);

}  // namespace megatron_acodm::cpu

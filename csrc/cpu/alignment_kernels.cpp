// CPU kernels of the alignment operators: one portable body, compiled for each instruction set
// and chosen when the program runs, so that a wheel built anywhere is fast everywhere.

#include "alignment_kernels.h"

#include <algorithm>
#include <vector>

#include "gram.h"
#include "lanes.h"
#include "sketch.h"

namespace megatron_acodm::cpu {
namespace {

// Columns that one step of a loop takes: two vectors of kLanes.
constexpr int64_t kStep = 2 * kLanes;
// Rows that a loop takes together: as many as have their sums in AVX-512's registers, and as
// many streams as the hardware prefetcher follows.
constexpr int kGroup = 8;
// Between its two visits a tile stays in L2. One group needs no second visit, so any tile does.
constexpr int64_t kTileBytes = 256 * 1024;
constexpr int64_t kMaxTile = 4096;
constexpr int64_t kMaxChunks = 256;
constexpr int64_t kMaxGramChunks = 64;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// u (+)= sum of num_rows <= ROWS rows, over n columns.
template <int WIDTH, int ROWS, typename T>
ACODM_INLINE void add_rows(int64_t num_rows, const T* rows, int64_t stride, int64_t n, bool first,
                           float* u) {
  if constexpr (ROWS > 1) {
    if (num_rows < ROWS) return add_rows<WIDTH, ROWS - 1>(num_rows, rows, stride, n, first, u);
  }
  using Pair = LanesPair<WIDTH>;
  for (int64_t column = 0; column < n; column += kStep) {
    Pair sum = first ? Pair{} : Pair::load(u + column);
    for (int row = 0; row < ROWS; ++row) sum += Pair::load(rows + row * stride + column);
    sum.store(u + column);
  }
}

// Lane sums of g (u - g) and of g g for num_rows <= ROWS rows g, over n columns. With COMPLETE, u
// is the sum of the rows before these, which are the last, and is completed first.
//
// g (u - g) rather than <g, u> - <g, g> at the end: where one row outweighs the others, the
// difference of two large sums would lose what is asked for.
template <int WIDTH, int ROWS, bool COMPLETE, typename T>
ACODM_INLINE void score_rows(int64_t num_rows, const T* rows, int64_t stride, int64_t n, bool first,
                             float* u, float* lane_sums) {
  if constexpr (ROWS > 1) {
    if (num_rows < ROWS) {
      return score_rows<WIDTH, ROWS - 1, COMPLETE>(num_rows, rows, stride, n, first, u, lane_sums);
    }
  }
  using Pair = LanesPair<WIDTH>;
  Lanes<WIDTH> products[ROWS], squares[ROWS];
  for (int row = 0; row < ROWS; ++row) {
    products[row] = Lanes<WIDTH>::load(lane_sums + 2 * kLanes * row);
    squares[row] = Lanes<WIDTH>::load(lane_sums + 2 * kLanes * row + kLanes);
  }
  for (int64_t column = 0; column < n; column += kStep) {
    Pair sum = COMPLETE && first ? Pair{} : Pair::load(u + column);
    if (COMPLETE) {
      for (int row = 0; row < ROWS; ++row) sum += Pair::load(rows + row * stride + column);
      if (!first) sum.store(u + column);
    }
    for (int row = 0; row < ROWS; ++row) {
      const Pair g = Pair::load(rows + row * stride + column);
      for (int half = 0; half < 2; ++half) {
        products[row].add_product(g.half[half], sum.half[half] - g.half[half]);
        squares[row].add_product(g.half[half], g.half[half]);
      }
    }
  }
  for (int row = 0; row < ROWS; ++row) {
    products[row].store(lane_sums + 2 * kLanes * row);
    squares[row].store(lane_sums + 2 * kLanes * row + kLanes);
  }
}

// One tile of n columns, n a multiple of kStep. The last group is visited once, others twice.
template <int WIDTH, typename T>
ACODM_INLINE void score_tile(const T* G, int64_t num_rows, int64_t stride, int64_t n, float* u,
                             float* lane_sums) {
  // Rows that have their sums in this target's registers.
  constexpr int kScored = WIDTH == 16 ? kGroup : 2;
  const int64_t last = std::min<int64_t>(num_rows, kScored);
  const int64_t head = num_rows - last;
  for (int64_t row = 0; row < head; row += kGroup) {
    add_rows<WIDTH, kGroup>(std::min<int64_t>(kGroup, head - row), G + row * stride, stride, n,
                            row == 0, u);
  }
  score_rows<WIDTH, kScored, true>(last, G + head * stride, stride, n, head == 0, u,
                                   lane_sums + 2 * kLanes * head);
  for (int64_t row = 0; row < head; row += kScored) {
    score_rows<WIDTH, kScored, false>(std::min<int64_t>(kScored, head - row), G + row * stride,
                                      stride, n, false, u, lane_sums + 2 * kLanes * row);
  }
}

// Adds the lane sums to the double sums and clears them.
void flush(int64_t num_rows, std::vector<float>& lane_sums, double* sums) {
  for (int64_t i = 0; i < 2 * num_rows; ++i) {
    double sum = 0;
    for (int64_t lane = 0; lane < kLanes; ++lane) sum += lane_sums[i * kLanes + lane];
    sums[i] += sum;
  }
  std::fill(lane_sums.begin(), lane_sums.end(), 0.0f);
}

template <int WIDTH, typename T>
ACODM_INLINE void sums_body(const T* G, int64_t num_rows, int64_t stride, int64_t begin,
                            int64_t end, int64_t tile, double* sums) {
  std::vector<float> u(tile);
  std::vector<float> lane_sums(2 * kLanes * num_rows);  // [K, 2, kLanes]
  std::fill(sums, sums + 2 * num_rows, 0.0);

  const int64_t whole_end = begin + (end - begin) / kStep * kStep;
  int64_t unflushed = 0;
  for (int64_t column = begin; column < whole_end; column += tile) {
    const int64_t n = std::min(tile, whole_end - column);
    score_tile<WIDTH>(G + column, num_rows, stride, n, u.data(), lane_sums.data());
    unflushed += n;
    if (unflushed >= kFlushColumns) {
      flush(num_rows, lane_sums, sums);
      unflushed = 0;
    }
  }
  if (whole_end < end) {  // the last columns, padded with zeros to a whole step
    std::vector<T> padded(num_rows * kStep);
    for (int64_t row = 0; row < num_rows; ++row) {
      std::copy_n(G + row * stride + whole_end, end - whole_end, padded.data() + row * kStep);
    }
    score_tile<WIDTH>(padded.data(), num_rows, kStep, kStep, u.data(), lane_sums.data());
  }
  flush(num_rows, lane_sums, sums);
}

template <int WIDTH, typename T>
ACODM_INLINE void add_growth(float* row, const T* main_grad, T* seen) {
  using L = Lanes<WIDTH>;
  L sum = L::load(row);
  sum += L::load(main_grad) - L::load(seen);
  sum.store(row);
  std::memcpy(seen, main_grad, kLanes * sizeof(T));
}

template <int WIDTH, typename T>
ACODM_INLINE void growth_body(float* row, const T* main_grad, T* seen, int64_t n) {
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) add_growth<WIDTH>(row + i, main_grad + i, seen + i);
  if (whole < n) {  // the last numbers, padded
    float row_tail[kLanes] = {};
    T main_tail[kLanes] = {}, seen_tail[kLanes] = {};
    std::copy_n(row + whole, n - whole, row_tail);
    std::copy_n(main_grad + whole, n - whole, main_tail);
    std::copy_n(seen + whole, n - whole, seen_tail);
    add_growth<WIDTH>(row_tail, main_tail, seen_tail);
    std::copy_n(row_tail, n - whole, row + whole);
    std::copy_n(seen_tail, n - whole, seen + whole);
  }
}

}  // namespace

static AlignmentPlan plan(int64_t num_rows, int64_t num_columns, int64_t max_chunks) {
  const int64_t fitting = kTileBytes / static_cast<int64_t>(sizeof(float)) / num_rows;
  const int64_t tile = std::min(kMaxTile, fitting / kStep * kStep);
  const int64_t tiles = divide_up(num_columns, tile);
  const int64_t chunk = std::max<int64_t>(1, divide_up(tiles, max_chunks)) * tile;
  return {tile, chunk, divide_up(num_columns, chunk)};
}

AlignmentPlan plan_alignment(int64_t num_rows, int64_t num_columns) {
  return plan(num_rows, num_columns, kMaxChunks);
}

AlignmentPlan plan_gram(int64_t num_rows, int64_t num_columns) {
  return plan(num_rows, num_columns, kMaxGramChunks);
}

int64_t num_gram_products(int64_t num_rows) { return gram_pairs(num_rows) * kGramProducts; }

// A template cannot carry a target attribute into each of its instances, hence the macro: it
// defines the kernels for one element type, with one version an instruction set.
#if defined(__x86_64__)
#define ACODM_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma")))
#define ACODM_AVX2 __attribute__((target("avx2,fma")))
#define ACODM_HAS_AVX512                                                      \
  (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && \
   __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
#define ACODM_HAS_AVX2 (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
#define ACODM_VERSIONS(RETURN, NAME, BODY, PARAMETERS, ...)                      \
  ACODM_AVX512 static RETURN NAME##_avx512 PARAMETERS { BODY<16>(__VA_ARGS__); } \
  ACODM_AVX2 static RETURN NAME##_avx2 PARAMETERS { BODY<8>(__VA_ARGS__); }      \
  RETURN NAME PARAMETERS {                                                       \
    static const bool avx512 = ACODM_HAS_AVX512, avx2 = ACODM_HAS_AVX2;          \
    if (avx512) return NAME##_avx512(__VA_ARGS__);                               \
    if (avx2) return NAME##_avx2(__VA_ARGS__);                                   \
    BODY<4>(__VA_ARGS__);                                                        \
  }
#else
#define ACODM_VERSIONS(RETURN, NAME, BODY, PARAMETERS, ...) \
  RETURN NAME PARAMETERS { BODY<4>(__VA_ARGS__); }
#endif

#define ACODM_KERNELS(T)                                                                        \
  ACODM_VERSIONS(void, alignment_sums, sums_body,                                               \
                 (const T* G, int64_t num_rows, int64_t row_stride, int64_t begin, int64_t end, \
                  int64_t tile, double* sums),                                                  \
                 G, num_rows, row_stride, begin, end, tile, sums)                               \
  ACODM_VERSIONS(void, gram_products, gram_body,                                                \
                 (const T* G, int64_t num_rows, int64_t row_stride, int64_t begin, int64_t end, \
                  int64_t tile, double* products),                                              \
                 G, num_rows, row_stride, begin, end, tile, products)                           \
  ACODM_VERSIONS(void, add_sketch, sketch_body,                                                 \
                 (float* row, int64_t num_buckets, const T* g, int64_t n, uint64_t key,         \
                  int64_t first_block, int64_t last_block),                                     \
                 row, num_buckets, g, n, key, first_block, last_block)                          \
  ACODM_VERSIONS(void, accumulate_growth, growth_body,                                          \
                 (float* row, const T* main_grad, T* seen, int64_t n), row, main_grad, seen, n)

ACODM_KERNELS(float)
ACODM_KERNELS(BFloat16Bits)

}  // namespace megatron_acodm::cpu

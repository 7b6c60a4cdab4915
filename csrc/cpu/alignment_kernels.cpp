// CPU kernels of the alignment operators: one portable body, compiled for each instruction set
// and chosen when the program runs, so that a wheel built anywhere is fast everywhere.

#include "alignment_kernels.h"

#include <algorithm>
#include <vector>

#include "lanes.h"

namespace megatron_acodm::cpu {
namespace {

// Columns summed in float lanes (256 products a lane) before they join the double sums.
constexpr int64_t kFlushColumns = 4096;
// Between its two visits a tile stays in L2, or, while there are few rows, in L1.
constexpr int64_t kTileBytes = 512 * 1024;
constexpr int64_t kMaxTile = 4096;
constexpr int64_t kFewRows = 8;
constexpr int64_t kFewRowsTile = 512;
constexpr int64_t kMaxChunks = 256;

// Rows that are added to the column sums together: so many streams the hardware prefetcher
// follows, and the fewer the times that the column sums are stored.
constexpr int kSummedRows = 8;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Scratch of one chunk: column sums, and the lane sums of each row.
struct Scratch {
  std::vector<float> u;
  std::vector<float> lanes;  // [K, 2, kLanes]
};

// u (+)= sum of ROWS rows, over n columns.
template <int WIDTH, int ROWS, typename T>
ACODM_INLINE void add_rows(const T* rows, int64_t stride, int64_t n, bool first, float* u) {
  for (int64_t column = 0; column < n; column += kLanes) {
    auto sum = first ? Lanes<WIDTH>{} : Lanes<WIDTH>::load(u + column);
    for (int row = 0; row < ROWS; ++row) sum += Lanes<WIDTH>::load(rows + row * stride + column);
    sum.store(u + column);
  }
}

// For ROWS rows g: lane sums of g (u - g) and of g g, over n columns. If these rows are the last
// (LAST), u holds the sum of the rows before them, and is completed here.
//
// g (u - g) rather than <g, u> - <g, g> at the end: where one row outweighs the others, the
// difference of two large sums would lose what is asked for.
template <int WIDTH, int ROWS, bool LAST, typename T>
ACODM_INLINE void score_rows(const T* rows, int64_t stride, int64_t n, bool first, float* u,
                             float* lane_sums) {
  using L = Lanes<WIDTH>;
  L products[ROWS], squares[ROWS];
  for (int row = 0; row < ROWS; ++row) {
    products[row] = L::load(lane_sums + 2 * kLanes * row);
    squares[row] = L::load(lane_sums + 2 * kLanes * row + kLanes);
  }
  for (int64_t column = 0; column < n; column += kLanes) {
    L g[ROWS];
    for (int row = 0; row < ROWS; ++row) g[row] = L::load(rows + row * stride + column);
    L sum = LAST && first ? L{} : L::load(u + column);
    if (LAST) {
      for (int row = 0; row < ROWS; ++row) sum += g[row];
      sum.store(u + column);
    }
    for (int row = 0; row < ROWS; ++row) {
      products[row].add_product(g[row], sum - g[row]);
      squares[row].add_product(g[row], g[row]);
    }
  }
  for (int row = 0; row < ROWS; ++row) {
    products[row].store(lane_sums + 2 * kLanes * row);
    squares[row].store(lane_sums + 2 * kLanes * row + kLanes);
  }
}

// score_rows of the last num_rows <= ROWS rows.
template <int WIDTH, int ROWS, typename T>
ACODM_INLINE void score_last_rows(int64_t num_rows, const T* rows, int64_t stride, int64_t n,
                                  bool first, float* u, float* lane_sums) {
  if (num_rows == ROWS) {
    score_rows<WIDTH, ROWS, true>(rows, stride, n, first, u, lane_sums);
  } else if constexpr (ROWS > 1) {
    score_last_rows<WIDTH, ROWS - 1>(num_rows, rows, stride, n, first, u, lane_sums);
  }
}

// One tile of n columns, n a multiple of kLanes. The last rows are visited once, the others twice.
template <int WIDTH, typename T>
ACODM_INLINE void score_tile(const T* G, int64_t num_rows, int64_t stride, int64_t n, float* u,
                             float* lane_sums) {
  // As many rows at a time as have their sums in registers: enough independent chains of
  // additions to hide their latency.
  constexpr int kScoredRows = WIDTH / 4 * (WIDTH / 4) / 2 > 0 ? WIDTH / 4 * (WIDTH / 4) / 2 : 1;
  const int64_t last = (num_rows - 1) % kScoredRows + 1;
  const int64_t head = num_rows - last;
  int64_t row = 0;
  for (; row + kSummedRows <= head; row += kSummedRows) {
    add_rows<WIDTH, kSummedRows>(G + row * stride, stride, n, row == 0, u);
  }
  for (; row < head; row += kScoredRows) {
    add_rows<WIDTH, kScoredRows>(G + row * stride, stride, n, row == 0, u);
  }
  score_last_rows<WIDTH, kScoredRows>(last, G + head * stride, stride, n, head == 0, u,
                                      lane_sums + 2 * kLanes * head);
  for (row = 0; row < head; row += kScoredRows) {
    score_rows<WIDTH, kScoredRows, false>(G + row * stride, stride, n, false, u,
                                          lane_sums + 2 * kLanes * row);
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
  Scratch scratch{std::vector<float>(tile), std::vector<float>(2 * kLanes * num_rows)};
  float* u = scratch.u.data();
  float* lane_sums = scratch.lanes.data();
  std::fill(sums, sums + 2 * num_rows, 0.0);

  const int64_t whole_end = begin + (end - begin) / kLanes * kLanes;
  int64_t unflushed = 0;
  for (int64_t column = begin; column < whole_end; column += tile) {
    const int64_t n = std::min(tile, whole_end - column);
    score_tile<WIDTH>(G + column, num_rows, stride, n, u, lane_sums);
    unflushed += n;
    if (unflushed >= kFlushColumns) {
      flush(num_rows, scratch.lanes, sums);
      unflushed = 0;
    }
  }
  if (whole_end < end) {  // the last columns, padded with zeros to whole lanes
    std::vector<T> padded(num_rows * kLanes);
    for (int64_t row = 0; row < num_rows; ++row) {
      std::copy_n(G + row * stride + whole_end, end - whole_end, padded.data() + row * kLanes);
    }
    score_tile<WIDTH>(padded.data(), num_rows, kLanes, kLanes, u, lane_sums);
  }
  flush(num_rows, scratch.lanes, sums);
}

template <int WIDTH, typename T>
ACODM_INLINE void growth_body(float* row, const T* main_grad, T* seen, int64_t n) {
  using L = Lanes<WIDTH>;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    L sum = L::load(row + i);
    sum += L::load(main_grad + i) - L::load(seen + i);
    sum.store(row + i);
    std::memcpy(seen + i, main_grad + i, kLanes * sizeof(T));
  }
  if (i < n) {
    float row_tail[kLanes] = {};
    T main_tail[kLanes] = {}, seen_tail[kLanes] = {};
    std::copy_n(row + i, n - i, row_tail);
    std::copy_n(main_grad + i, n - i, main_tail);
    std::copy_n(seen + i, n - i, seen_tail);
    L sum = L::load(row_tail);
    sum += L::load(main_tail) - L::load(seen_tail);
    sum.store(row_tail);
    std::copy_n(row_tail, n - i, row + i);
    std::copy_n(main_tail, n - i, seen + i);
  }
}

}  // namespace

AlignmentPlan plan_alignment(int64_t num_rows, int64_t num_columns) {
  int64_t tile = kFewRowsTile;
  if (num_rows > kFewRows) {
    const int64_t fitting = kTileBytes / static_cast<int64_t>(sizeof(float)) / num_rows;
    tile = std::min(kMaxTile, fitting / 64 * 64);
  }
  const int64_t tiles = divide_up(num_columns, tile);
  const int64_t chunk = std::max<int64_t>(1, divide_up(tiles, kMaxChunks)) * tile;
  return {tile, chunk, divide_up(num_columns, chunk)};
}

// A template cannot carry a target attribute into each of its instances, hence the macro: it
// defines the two kernels for one element type, with one version an instruction set.
#if defined(__x86_64__)
#define ACODM_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma")))
#define ACODM_AVX2 __attribute__((target("avx2,fma")))
#define ACODM_HAS_AVX512                                                        \
  (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&   \
   __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
#define ACODM_HAS_AVX2 (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
#define ACODM_VERSIONS(RETURN, NAME, BODY, PARAMETERS, ...)            \
  ACODM_AVX512 static RETURN NAME##_avx512 PARAMETERS {                \
    BODY<16>(__VA_ARGS__);                                             \
  }                                                                    \
  ACODM_AVX2 static RETURN NAME##_avx2 PARAMETERS { BODY<8>(__VA_ARGS__); } \
  RETURN NAME PARAMETERS {                                             \
    static const bool avx512 = ACODM_HAS_AVX512, avx2 = ACODM_HAS_AVX2; \
    if (avx512) return NAME##_avx512(__VA_ARGS__);                     \
    if (avx2) return NAME##_avx2(__VA_ARGS__);                         \
    BODY<4>(__VA_ARGS__);                                              \
  }
#else
#define ACODM_VERSIONS(RETURN, NAME, BODY, PARAMETERS, ...) \
  RETURN NAME PARAMETERS { BODY<4>(__VA_ARGS__); }
#endif

#define ACODM_KERNELS(T)                                                                       \
  ACODM_VERSIONS(void, alignment_sums, sums_body,                                              \
                 (const T* G, int64_t num_rows, int64_t row_stride, int64_t begin, int64_t end, \
                  int64_t tile, double* sums),                                                 \
                 G, num_rows, row_stride, begin, end, tile, sums)                              \
  ACODM_VERSIONS(void, accumulate_growth, growth_body,                                         \
                 (float* row, const T* main_grad, T* seen, int64_t n), row, main_grad, seen, n)

ACODM_KERNELS(float)
ACODM_KERNELS(BFloat16Bits)

}  // namespace megatron_acodm::cpu

// The Gram matrix on CUDA. Rows are taken in panels of 16, 32 or 64; a block multiplies the
// columns of one panel with those of another, each thread a square of the result. Up to 64 rows are
// one panel, and G is read once.
#pragma once

#include <algorithm>

#include "common.cuh"

namespace megatron_acodm::cuda {

constexpr int kSide = 16;         // threads along each side of a panel's product
constexpr int kGramColumns = 64;  // columns in shared memory at a time
constexpr int kGramFlush = 16;    // tiles summed in float before they join the double sums
constexpr int64_t kMaxGramBlocks = 264;  // along the columns

inline int gram_squares(int64_t num_rows) { return num_rows <= 16 ? 1 : num_rows <= 32 ? 2 : 4; }

inline int64_t gram_panels(int64_t num_rows) {
  const int64_t rows = kSide * gram_squares(num_rows);
  return (num_rows + rows - 1) / rows;
}

// kGramColumns columns of a panel, transposed to [column][row]; zeros past the last row and column.
template <int ROWS, int STRIDE, typename T>
__device__ void load_panel(const T* __restrict__ G, int num_rows, int64_t num_columns,
                           int64_t row_stride, int first_row, int64_t begin, float* panel) {
  for (int index = threadIdx.x; index < ROWS * kGramColumns; index += kThreads) {
    const int row = index / kGramColumns, column = index % kGramColumns;
    const bool valid = first_row + row < num_rows && begin + column < num_columns;
    panel[column * STRIDE + row] =
        valid ? to_float(G[(first_row + row) * row_stride + begin + column]) : 0.0f;
  }
}

// partial[blockIdx.x, pair] = [ROWS, ROWS] products of panels a <= b over every gridDim.x-th tile
// of columns, for pair = blockIdx.y of (0, 0), (0, 1), ..., (1, 1), ...
template <int SQUARE, typename T>
__global__ void __launch_bounds__(kThreads)
    gram_tiles(const T* __restrict__ G, int num_rows, int64_t num_columns, int64_t row_stride,
               int num_panels, double* __restrict__ partial) {
  constexpr int kRows = kSide * SQUARE;
  constexpr int kStride = kRows + 4;  // keeps 16-byte alignment and spreads the banks
  __shared__ __align__(16) float left[kGramColumns * kStride];
  __shared__ __align__(16) float right[kGramColumns * kStride];
  int a = 0, b = blockIdx.y;
  for (int length = num_panels; b >= length; --length) {
    b -= length;
    ++a;
  }
  b += a;
  const int x = threadIdx.x % kSide, y = threadIdx.x / kSide;
  float sums[SQUARE][SQUARE] = {};
  double totals[SQUARE][SQUARE] = {};
  int unflushed = 0;
  for (int64_t begin = static_cast<int64_t>(blockIdx.x) * kGramColumns; begin < num_columns;
       begin += static_cast<int64_t>(gridDim.x) * kGramColumns) {
    load_panel<kRows, kStride>(G, num_rows, num_columns, row_stride, a * kRows, begin, left);
    if (a != b) {
      load_panel<kRows, kStride>(G, num_rows, num_columns, row_stride, b * kRows, begin, right);
    }
    __syncthreads();
    const float* other = a == b ? left : right;
#pragma unroll 4
    for (int column = 0; column < kGramColumns; ++column) {
      float l[SQUARE], r[SQUARE];
#pragma unroll
      for (int i = 0; i < SQUARE; ++i) {
        l[i] = left[column * kStride + y * SQUARE + i];
        r[i] = other[column * kStride + x * SQUARE + i];
      }
#pragma unroll
      for (int i = 0; i < SQUARE; ++i) {
#pragma unroll
        for (int j = 0; j < SQUARE; ++j) sums[i][j] += l[i] * r[j];
      }
    }
    __syncthreads();
    if (++unflushed == kGramFlush) {
      unflushed = 0;
#pragma unroll
      for (int i = 0; i < SQUARE; ++i) {
#pragma unroll
        for (int j = 0; j < SQUARE; ++j) {
          totals[i][j] += sums[i][j];
          sums[i][j] = 0;
        }
      }
    }
  }
  double* target =
      partial + (static_cast<int64_t>(blockIdx.x) * gridDim.y + blockIdx.y) * kRows * kRows;
#pragma unroll
  for (int i = 0; i < SQUARE; ++i) {
#pragma unroll
    for (int j = 0; j < SQUARE; ++j) {
      target[(y * SQUARE + i) * kRows + x * SQUARE + j] = totals[i][j] + sums[i][j];
    }
  }
}

// H[i, j] = H[j, i] = sum over the blocks, in order.
__global__ void __launch_bounds__(kThreads)
    add_gram_blocks(const double* __restrict__ partial, int blocks, int num_rows, int rows,
                    int num_panels, double* __restrict__ H) {
  const int index = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  const int i = index / num_rows, j = index % num_rows;
  if (i >= num_rows || j < i) return;
  const int a = i / rows, b = j / rows;
  const int pair = a * num_panels - a * (a - 1) / 2 + b - a;
  const int64_t pairs = static_cast<int64_t>(num_panels) * (num_panels + 1) / 2;
  const double* source = partial + (static_cast<int64_t>(pair) * rows + i % rows) * rows + j % rows;
  double sum = 0;
  for (int block = 0; block < blocks; ++block) sum += source[block * pairs * rows * rows];
  H[i * num_rows + j] = H[j * num_rows + i] = sum;
}

template <typename T>
cudaError_t launch_gram(const T* G, int64_t num_rows, int64_t num_columns, int64_t row_stride,
                        int64_t blocks, double* partial, double* H, cudaStream_t stream) {
  const int square = gram_squares(num_rows);
  const int panels = static_cast<int>(gram_panels(num_rows)), rows = static_cast<int>(num_rows);
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(panels * (panels + 1) / 2));
  const auto kernel = square == 1   ? gram_tiles<1, T>
                      : square == 2 ? gram_tiles<2, T>
                                    : gram_tiles<4, T>;
  kernel<<<grid, kThreads, 0, stream>>>(G, rows, num_columns, row_stride, panels, partial);
  add_gram_blocks<<<(rows * rows + kThreads - 1) / kThreads, kThreads, 0, stream>>>(
      partial, static_cast<int>(blocks), rows, kSide * square, panels, H);
  return cudaGetLastError();
}

}  // namespace megatron_acodm::cuda

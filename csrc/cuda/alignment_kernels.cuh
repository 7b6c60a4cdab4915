// Launchers of the CUDA kernels of the alignment operators: raw pointers and a stream, no torch
// header, so that they compile with nvcc alone on a machine without torch or a GPU.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace megatron_acodm::cuda {

// The bits of a bfloat16: the upper half of a float32.
struct BFloat16Bits {
  uint16_t bits;
};

// Blocks to launch domain_alignment with on a device of so many multiprocessors. The caller
// provides `partial`: [blocks, num_rows, 2] doubles.
int64_t alignment_blocks(int64_t num_rows, int64_t num_columns, int element_size,
                         int num_multiprocessors);

// W[i] = <G_i, sum_{j != i} G_j>, sq_norm[i] = ||G_i||^2, in double. Row i begins at
// G + i * row_stride; the elements of a row lie side by side.
cudaError_t domain_alignment(const float* G, int64_t num_rows, int64_t num_columns,
                             int64_t row_stride, int64_t blocks, double* partial, double* W,
                             double* sq_norm, cudaStream_t stream);
cudaError_t domain_alignment(const BFloat16Bits* G, int64_t num_rows, int64_t num_columns,
                             int64_t row_stride, int64_t blocks, double* partial, double* W,
                             double* sq_norm, cudaStream_t stream);

// Blocks to launch gram with. The caller provides `partial`: [blocks, gram_partial_size] doubles.
int64_t gram_blocks(int64_t num_columns);
int64_t gram_partial_size(int64_t num_rows);

// H[i, j] = <G_i, G_j> in double, [num_rows, num_rows].
cudaError_t gram(const float* G, int64_t num_rows, int64_t num_columns, int64_t row_stride,
                 int64_t blocks, double* partial, double* H, cudaStream_t stream);
cudaError_t gram(const BFloat16Bits* G, int64_t num_rows, int64_t num_columns, int64_t row_stride,
                 int64_t blocks, double* partial, double* H, cudaStream_t stream);

// Runs to launch add_sketch with. The caller provides `partial`: [runs, num_buckets] floats.
int64_t sketch_runs_needed(int64_t num_buckets, int64_t n, int num_multiprocessors);

// Adds the sketch of the n numbers of g to a row of num_buckets, a multiple of 64 below 2^31.
cudaError_t add_sketch(float* row, int64_t num_buckets, const float* g, int64_t n, uint64_t key,
                       int64_t runs, float* partial, cudaStream_t stream);
cudaError_t add_sketch(float* row, int64_t num_buckets, const BFloat16Bits* g, int64_t n,
                       uint64_t key, int64_t runs, float* partial, cudaStream_t stream);

// row += main_grad - seen; seen = main_grad; over n elements.
cudaError_t accumulate_growth(float* row, const float* main_grad, float* seen, int64_t n,
                              int num_multiprocessors, cudaStream_t stream);
cudaError_t accumulate_growth(float* row, const BFloat16Bits* main_grad, BFloat16Bits* seen,
                              int64_t n, int num_multiprocessors, cudaStream_t stream);

}  // namespace megatron_acodm::cuda

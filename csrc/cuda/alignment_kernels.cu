// CUDA kernels of the alignment operators; the sketch and the Gram matrix are in sketch.cuh and
// gram.cuh. Neighbouring threads read neighbouring memory, each number once, those here in 16-byte
// loads; nothing depends on the order of atomics.

#include <cuda_pipeline.h>

#include <algorithm>

#include "alignment_kernels.cuh"
#include "common.cuh"
#include "gram.cuh"
#include "sketch.cuh"

namespace megatron_acodm::cuda {
namespace {

// Blocks that share a multiprocessor: while some compute, the others' copies are in flight.
constexpr int kBlocksPerMultiprocessor = 4;
// Shared memory of a multiprocessor that any of sm_80, sm_90, sm_100 can give.
constexpr int64_t kSharedBytes = 160 * 1024;
constexpr int kMinTileBits = 6;
constexpr int kMaxTileBits = 10;

// 16 bytes of elements, moved by one instruction.
template <typename T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T element[kSize];
};

template <typename T>
int64_t shared_bytes(int64_t num_rows, int tile_bits) {
  const int64_t tile = int64_t{1} << tile_bits;
  return 2 * num_rows * sizeof(double) + tile * sizeof(float) + num_rows * tile * sizeof(T);
}

// A tile has 2^bits columns: as many as let kBlocksPerMultiprocessor blocks share a multiprocessor.
template <typename T>
int tile_bits(int64_t num_rows) {
  int bits = kMaxTileBits;
  while (bits > kMinTileBits &&
         shared_bytes<T>(num_rows, bits) > kSharedBytes / kBlocksPerMultiprocessor) {
    --bits;
  }
  return bits;
}

template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
  for (int offset = 16; offset > 0; offset /= 2) {
    value += __shfl_down_sync(0xffffffffu, value, offset);
  }
  return value;
}

// Copies the columns [begin, begin + tile) of all rows to shared memory, zeros past the last.
template <typename T, bool ALIGNED>
__device__ void load_tile(const T* __restrict__ G, int num_rows, int64_t num_columns,
                          int64_t row_stride, int64_t begin, int bits, T* rows) {
  constexpr int kPack = ALIGNED ? Pack<T>::kSize : 1;
  constexpr int kPackBits = kPack == 8 ? 3 : kPack == 4 ? 2 : 0;
  const int pack_bits = bits - kPackBits;
  for (int index = threadIdx.x; index < num_rows << pack_bits; index += kThreads) {
    const int row = index >> pack_bits;
    const int column = (index - (row << pack_bits)) * kPack;
    const int64_t valid = num_columns - begin - column;
    T* target = rows + (row << bits) + column;
    const T* source = G + row * row_stride + begin + column;
    if (!ALIGNED) {
      *target = valid > 0 ? *source : T{};
    } else if (valid >= kPack) {
      __pipeline_memcpy_async(target, source, sizeof(Pack<T>));
    } else {
      for (int i = 0; i < kPack; ++i) target[i] = i < valid ? source[i] : T{};
    }
  }
  if (ALIGNED) {
    __pipeline_commit();
    __pipeline_wait_prior(0);
  }
}

// Each block takes every gridDim.x-th tile: copies it to shared memory, sums its columns, then
// its warps take a row each and add their products to double sums. Every sum has a fixed order,
// so results repeat on a device.
template <typename T, bool ALIGNED>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    score_tiles(const T* __restrict__ G, int num_rows, int64_t num_columns, int64_t row_stride,
                int bits, double* __restrict__ partial) {
  constexpr int kPack = Pack<T>::kSize;
  const int tile = 1 << bits;
  extern __shared__ __align__(16) unsigned char shared[];
  double* sums = reinterpret_cast<double*>(shared);          // [num_rows, 2]
  float* u = reinterpret_cast<float*>(sums + 2 * num_rows);  // [tile]
  T* rows = reinterpret_cast<T*>(u + tile);                  // [num_rows, tile]

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int i = threadIdx.x; i < 2 * num_rows; i += kThreads) sums[i] = 0;

  for (int64_t begin = static_cast<int64_t>(blockIdx.x) * tile; begin < num_columns;
       begin += static_cast<int64_t>(gridDim.x) * tile) {
    load_tile<T, ALIGNED>(G, num_rows, num_columns, row_stride, begin, bits, rows);
    __syncthreads();
    for (int column = threadIdx.x; column < tile; column += kThreads) {
      float sum = 0;
#pragma unroll 8
      for (int row = 0; row < num_rows; ++row) sum += to_float(rows[(row << bits) + column]);
      u[column] = sum;
    }
    __syncthreads();
    for (int row = warp; row < num_rows; row += kWarps) {
      float product = 0, square = 0;
      for (int column = lane * kPack; column < tile; column += 32 * kPack) {
        const auto pack = *reinterpret_cast<const Pack<T>*>(rows + (row << bits) + column);
        Pack<float> sum;
        for (int i = 0; i < kPack; ++i) {
          if (i % 4 == 0) sum = *reinterpret_cast<const Pack<float>*>(u + column + i);
          const float g = to_float(pack.element[i]);
          product += g * (sum.element[i % 4] - g);
          square += g * g;
        }
      }
      product = warp_sum(product);
      square = warp_sum(square);
      if (lane == 0) {
        sums[2 * row] += product;
        sums[2 * row + 1] += square;
      }
    }
    __syncthreads();
  }
  for (int i = threadIdx.x; i < 2 * num_rows; i += kThreads) {
    partial[static_cast<int64_t>(blockIdx.x) * 2 * num_rows + i] = sums[i];
  }
}

// One warp a row: the sums of all blocks, in an order that depends on their number alone.
__global__ void add_blocks(const double* __restrict__ partial, int64_t blocks, int num_rows,
                           double* __restrict__ W, double* __restrict__ sq_norm) {
  const int row = blockIdx.x, lane = threadIdx.x;
  double product = 0, square = 0;
  for (int64_t block = lane; block < blocks; block += 32) {
    product += partial[(block * num_rows + row) * 2];
    square += partial[(block * num_rows + row) * 2 + 1];
  }
  product = warp_sum(product);
  square = warp_sum(square);
  if (lane == 0) {
    W[row] = product;
    sq_norm[row] = square;
  }
}

template <typename T, bool ALIGNED>
__global__ void __launch_bounds__(kThreads)
    add_growth(float* __restrict__ row, const T* __restrict__ main_grad, T* __restrict__ seen,
               int64_t n) {
  constexpr int kPack = Pack<T>::kSize;
  const int64_t packs = n / kPack;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  if (ALIGNED) {
    for (int64_t i = first; i < packs; i += step) {
      const auto now = reinterpret_cast<const Pack<T>*>(main_grad)[i];
      const auto before = reinterpret_cast<const Pack<T>*>(seen)[i];
      auto* target = reinterpret_cast<float4*>(row) + i * (kPack / 4);
      for (int quad = 0; quad < kPack / 4; ++quad) {
        float4 sum = target[quad];
        const T* a = now.element + 4 * quad;
        const T* b = before.element + 4 * quad;
        sum.x += to_float(a[0]) - to_float(b[0]);
        sum.y += to_float(a[1]) - to_float(b[1]);
        sum.z += to_float(a[2]) - to_float(b[2]);
        sum.w += to_float(a[3]) - to_float(b[3]);
        target[quad] = sum;
      }
      reinterpret_cast<Pack<T>*>(seen)[i] = now;
    }
  }
  // What packs leave over, or everything where a pointer is not aligned.
  for (int64_t i = (ALIGNED ? packs * kPack : 0) + first; i < n; i += step) {
    const T now = main_grad[i];
    row[i] += to_float(now) - to_float(seen[i]);
    seen[i] = now;
  }
}

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <typename T, bool ALIGNED>
cudaError_t launch_alignment(const T* G, int64_t num_rows, int64_t num_columns, int64_t row_stride,
                             int64_t blocks, double* partial, double* W, double* sq_norm,
                             cudaStream_t stream) {
  const int bits = tile_bits<T>(num_rows);
  const int bytes = static_cast<int>(shared_bytes<T>(num_rows, bits));
  const auto kernel = score_tiles<T, ALIGNED>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(blocks), kThreads, bytes, stream>>>(
      G, static_cast<int>(num_rows), num_columns, row_stride, bits, partial);
  add_blocks<<<static_cast<unsigned>(num_rows), 32, 0, stream>>>(
      partial, blocks, static_cast<int>(num_rows), W, sq_norm);
  return cudaGetLastError();
}

template <typename T>
cudaError_t dispatch_alignment(const T* G, int64_t num_rows, int64_t num_columns,
                               int64_t row_stride, int64_t blocks, double* partial, double* W,
                               double* sq_norm, cudaStream_t stream) {
  const bool aligned = is_aligned(G) && row_stride * sizeof(T) % 16 == 0;
  const auto launch = aligned ? launch_alignment<T, true> : launch_alignment<T, false>;
  return launch(G, num_rows, num_columns, row_stride, blocks, partial, W, sq_norm, stream);
}

template <typename T>
cudaError_t launch_growth(float* row, const T* main_grad, T* seen, int64_t n,
                          int num_multiprocessors, cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  const bool aligned = is_aligned(row) && is_aligned(main_grad) && is_aligned(seen);
  const int64_t needed = (n + kThreads - 1) / kThreads;
  const auto blocks =
      static_cast<unsigned>(std::min<int64_t>(needed, int64_t{8} * num_multiprocessors));
  const auto kernel = aligned ? add_growth<T, true> : add_growth<T, false>;
  kernel<<<blocks, kThreads, 0, stream>>>(row, main_grad, seen, n);
  return cudaGetLastError();
}

}  // namespace

int64_t alignment_blocks(int64_t num_rows, int64_t num_columns, int element_size,
                         int num_multiprocessors) {
  const bool is_float = element_size == sizeof(float);
  const int bits = is_float ? tile_bits<float>(num_rows) : tile_bits<BFloat16Bits>(num_rows);
  const int64_t bytes =
      is_float ? shared_bytes<float>(num_rows, bits) : shared_bytes<BFloat16Bits>(num_rows, bits);
  const int64_t resident = std::min<int64_t>(kBlocksPerMultiprocessor, kSharedBytes / bytes);
  const int64_t tiles = (num_columns + (int64_t{1} << bits) - 1) >> bits;
  return std::max<int64_t>(1, std::min(tiles, resident * num_multiprocessors));
}

cudaError_t domain_alignment(const float* G, int64_t num_rows, int64_t num_columns,
                             int64_t row_stride, int64_t blocks, double* partial, double* W,
                             double* sq_norm, cudaStream_t stream) {
  return dispatch_alignment(G, num_rows, num_columns, row_stride, blocks, partial, W, sq_norm,
                            stream);
}

cudaError_t domain_alignment(const BFloat16Bits* G, int64_t num_rows, int64_t num_columns,
                             int64_t row_stride, int64_t blocks, double* partial, double* W,
                             double* sq_norm, cudaStream_t stream) {
  return dispatch_alignment(G, num_rows, num_columns, row_stride, blocks, partial, W, sq_norm,
                            stream);
}

int64_t gram_blocks(int64_t num_columns) {
  const int64_t tiles = (num_columns + kGramColumns - 1) / kGramColumns;
  return std::clamp<int64_t>(tiles, 1, kMaxGramBlocks);
}

int64_t gram_partial_size(int64_t num_rows) {
  const int64_t panels = gram_panels(num_rows), rows = kSide * gram_squares(num_rows);
  return panels * (panels + 1) / 2 * rows * rows;
}

cudaError_t gram(const float* G, int64_t num_rows, int64_t num_columns, int64_t row_stride,
                 int64_t blocks, double* partial, double* H, cudaStream_t stream) {
  return launch_gram(G, num_rows, num_columns, row_stride, blocks, partial, H, stream);
}

cudaError_t gram(const BFloat16Bits* G, int64_t num_rows, int64_t num_columns, int64_t row_stride,
                 int64_t blocks, double* partial, double* H, cudaStream_t stream) {
  return launch_gram(G, num_rows, num_columns, row_stride, blocks, partial, H, stream);
}

int64_t sketch_runs_needed(int64_t num_buckets, int64_t n, int num_multiprocessors) {
  const int64_t blocks = (n + num_buckets - 1) / num_buckets;
  const int64_t full = int64_t{2048} * num_multiprocessors;  // threads that fill the device
  const int64_t wanted = (full + num_buckets - 1) / num_buckets;
  return std::clamp<int64_t>(std::min(wanted, blocks), 1, kMaxRuns);
}

cudaError_t add_sketch(float* row, int64_t num_buckets, const float* g, int64_t n, uint64_t key,
                       int64_t runs, float* partial, cudaStream_t stream) {
  return launch_sketch(row, num_buckets, g, n, key, runs, partial, stream);
}

cudaError_t add_sketch(float* row, int64_t num_buckets, const BFloat16Bits* g, int64_t n,
                       uint64_t key, int64_t runs, float* partial, cudaStream_t stream) {
  return launch_sketch(row, num_buckets, g, n, key, runs, partial, stream);
}

cudaError_t accumulate_growth(float* row, const float* main_grad, float* seen, int64_t n,
                              int num_multiprocessors, cudaStream_t stream) {
  return launch_growth(row, main_grad, seen, n, num_multiprocessors, stream);
}

cudaError_t accumulate_growth(float* row, const BFloat16Bits* main_grad, BFloat16Bits* seen,
                              int64_t n, int num_multiprocessors, cudaStream_t stream) {
  return launch_growth(row, main_grad, seen, n, num_multiprocessors, stream);
}

}  // namespace megatron_acodm::cuda

// Sixteen float lanes that map to whatever vector registers the target has.
//
// Every target sums in the same sixteen lanes, so results do not depend on the register width. The
// GCC vector extensions are used in place of intrinsics: one source for AVX-512, AVX2 and the
// baseline of any architecture.
#pragma once

#include <cstdint>
#include <cstring>

#include "alignment_kernels.h"

#define ACODM_INLINE inline __attribute__((always_inline))

namespace megatron_acodm::cpu {

constexpr int64_t kLanes = 16;

template <int WIDTH>
struct VectorTypes;

#define ACODM_VECTOR_TYPES(WIDTH)                                     \
  template <>                                                         \
  struct VectorTypes<WIDTH> {                                         \
    typedef float Float __attribute__((vector_size(4 * WIDTH)));      \
    typedef uint32_t Word __attribute__((vector_size(4 * WIDTH)));    \
    typedef uint16_t Half __attribute__((vector_size(2 * WIDTH)));    \
  };
ACODM_VECTOR_TYPES(4)
ACODM_VECTOR_TYPES(8)
ACODM_VECTOR_TYPES(16)
#undef ACODM_VECTOR_TYPES

template <int WIDTH>
struct Lanes {
  using Vector = typename VectorTypes<WIDTH>::Float;
  static constexpr int kParts = kLanes / WIDTH;

  Vector part[kParts];

  static ACODM_INLINE Lanes zero() { return Lanes{}; }

  static ACODM_INLINE Lanes load(const float* source) {
    Lanes lanes;
    for (int i = 0; i < kParts; ++i) {
      std::memcpy(&lanes.part[i], source + i * WIDTH, sizeof(Vector));
    }
    return lanes;
  }

  static ACODM_INLINE Lanes load(const BFloat16Bits* source) {
    using Half = typename VectorTypes<WIDTH>::Half;
    using Word = typename VectorTypes<WIDTH>::Word;
    Lanes lanes;
    for (int i = 0; i < kParts; ++i) {
      Half half;
      std::memcpy(&half, source + i * WIDTH, sizeof(Half));
      const Word word = __builtin_convertvector(half, Word) << 16;
      std::memcpy(&lanes.part[i], &word, sizeof(Vector));
    }
    return lanes;
  }

  ACODM_INLINE void store(float* target) const {
    for (int i = 0; i < kParts; ++i) std::memcpy(target + i * WIDTH, &part[i], sizeof(Vector));
  }

  ACODM_INLINE Lanes& operator+=(const Lanes& other) {
    for (int i = 0; i < kParts; ++i) part[i] += other.part[i];
    return *this;
  }

  // this += a * b
  ACODM_INLINE void add_product(const Lanes& a, const Lanes& b) {
    for (int i = 0; i < kParts; ++i) part[i] += a.part[i] * b.part[i];
  }

  ACODM_INLINE Lanes operator-(const Lanes& other) const {
    Lanes difference;
    for (int i = 0; i < kParts; ++i) difference.part[i] = part[i] - other.part[i];
    return difference;
  }
};

}  // namespace megatron_acodm::cpu

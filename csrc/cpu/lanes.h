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
// Columns summed in float lanes (256 products a lane) before they join double sums.
constexpr int64_t kFlushColumns = 4096;

template <int WIDTH>
struct VectorTypes;

#define ACODM_VECTOR_TYPES(WIDTH)                                  \
  template <>                                                      \
  struct VectorTypes<WIDTH> {                                      \
    typedef float Float __attribute__((vector_size(4 * WIDTH)));   \
    typedef uint32_t Word __attribute__((vector_size(4 * WIDTH))); \
    typedef uint16_t Half __attribute__((vector_size(2 * WIDTH))); \
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

  // Lane i changes its sign where bit first + i is set; first is 0 or 16.
  ACODM_INLINE void flip_signs(uint32_t bits, int first) {
    using Word = typename VectorTypes<WIDTH>::Word;
    for (int i = 0; i < kParts; ++i) {
      Word words, to_sign;
      for (int lane = 0; lane < WIDTH; ++lane) to_sign[lane] = 31 - first - i * WIDTH - lane;
      std::memcpy(&words, &part[i], sizeof(Word));
      words ^= ((Word{} + bits) << to_sign) & 0x80000000u;
      std::memcpy(&part[i], &words, sizeof(Word));
    }
  }

  ACODM_INLINE Lanes operator-(const Lanes& other) const {
    Lanes difference;
    for (int i = 0; i < kParts; ++i) difference.part[i] = part[i] - other.part[i];
    return difference;
  }
};

// Two vectors of lanes, 32 numbers. Of bfloat16, the first holds the even ones and the second the
// odd ones: one instruction each, where keeping their order takes two. Sums over columns do not
// mind, as long as every row is laid out alike.
template <int WIDTH>
struct LanesPair {
  Lanes<WIDTH> half[2];

  static ACODM_INLINE LanesPair load(const float* source) {
    return {{Lanes<WIDTH>::load(source), Lanes<WIDTH>::load(source + kLanes)}};
  }

  static ACODM_INLINE LanesPair load(const BFloat16Bits* source) {
    using Lane = Lanes<WIDTH>;
    using Word = typename VectorTypes<WIDTH>::Word;
    LanesPair pair;
    for (int i = 0; i < Lane::kParts; ++i) {
      Word words;  // little endian: the even element is the lower half
      std::memcpy(&words, source + 2 * i * WIDTH, sizeof(Word));
      const Word even = words << 16, odd = words & 0xffff0000u;
      std::memcpy(&pair.half[0].part[i], &even, sizeof(Word));
      std::memcpy(&pair.half[1].part[i], &odd, sizeof(Word));
    }
    return pair;
  }

  ACODM_INLINE void store(float* target) const {
    half[0].store(target);
    half[1].store(target + kLanes);
  }

  ACODM_INLINE LanesPair& operator+=(const LanesPair& other) {
    half[0] += other.half[0];
    half[1] += other.half[1];
    return *this;
  }
};

}  // namespace megatron_acodm::cpu

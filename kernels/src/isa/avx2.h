// AVX2 and FMA: nearly every x86 CPU since 2013.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "isa/inline.h"

namespace graphprune {

struct Avx2 {
  static constexpr int BYTES = 32;
  typedef float Floats __attribute__((vector_size(32)));
  typedef int32_t Ints __attribute__((vector_size(32)));
  typedef uint32_t Words __attribute__((vector_size(32)));
  typedef uint8_t Bytes __attribute__((vector_size(32)));

  static constexpr int TOKENS = 4, VECTORS = 2;  // 8 sums, 2 weights, 1 input, the ones, 2 between
  static constexpr int CHAINS = 4;               // sums wait for an addition only
  static constexpr int OFFSET = 0;

  // Pairs are added in 16 bits, which saturate: exact for weights within +-64 (7 bits).
  GRAPHPRUNE_INLINE Ints dot(Ints sums, Ints inputs, Ints weights) {
    const __m256i pairs = _mm256_maddubs_epi16((__m256i)inputs, (__m256i)weights);
    return sums + (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  }

  GRAPHPRUNE_INLINE Floats fma(Floats a, Floats b, Floats c) {
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
  }
};

}  // namespace graphprune

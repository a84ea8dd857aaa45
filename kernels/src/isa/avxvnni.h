// AVX-VNNI, 256 bits: Alder Lake and later clients.
#pragma once

#ifdef GRAPHPRUNE_SIMDE  // tests only: the same code on a CPU that lacks the instructions
#include <simde/x86/avx512.h>
#include <simde/x86/fma.h>
#else
#include <immintrin.h>
#endif

#include <cstdint>

#include "isa/inline.h"

namespace graphprune {

struct AvxVnni {
  static constexpr int BYTES = 32;
  typedef float Floats __attribute__((vector_size(32)));
  typedef int32_t Ints __attribute__((vector_size(32)));
  typedef uint32_t Words __attribute__((vector_size(32)));
  typedef uint8_t Bytes __attribute__((vector_size(32)));

  static constexpr int TOKENS = 3, VECTORS = 4;  // 12 sums, 3 inputs; weights come from memory
  static constexpr int CHAINS = 8;
  static constexpr int OFFSET = 0;

  GRAPHPRUNE_INLINE Ints dot(Ints sums, Ints inputs, Ints weights) {
#ifdef GRAPHPRUNE_SIMDE
    return (Ints)simde_mm256_dpbusd_epi32((simde__m256i)sums, (simde__m256i)inputs,
                                          (simde__m256i)weights);
#else
    return (Ints)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)inputs, (__m256i)weights);
#endif
  }

  GRAPHPRUNE_INLINE Floats fma(Floats a, Floats b, Floats c) {
#ifdef GRAPHPRUNE_SIMDE
    return (Floats)simde_mm256_fmadd_ps((simde__m256)a, (simde__m256)b, (simde__m256)c);
#else
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#endif
  }
};

}  // namespace graphprune

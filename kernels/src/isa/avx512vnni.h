// AVX-512 with VNNI: Ice Lake, Zen 4 and later servers.
#pragma once

#ifdef GRAPHPRUNE_SIMDE  // tests only: the same code on a CPU that lacks the instructions
#include <simde/x86/avx512.h>
#else
#include <immintrin.h>
#endif

#include <cstdint>

#include "isa/inline.h"

namespace graphprune {

struct Avx512Vnni {
  static constexpr int BYTES = 64;
  typedef float Floats __attribute__((vector_size(64)));
  typedef int32_t Ints __attribute__((vector_size(64)));
  typedef uint32_t Words __attribute__((vector_size(64)));
  typedef uint8_t Bytes __attribute__((vector_size(64)));

  static constexpr int TOKENS = 8, VECTORS = 2;   // 16 sums, 2 weights, 1 input of 32 registers
  static constexpr int CHAINS = 16;               // 5 cycles of latency, 1 or 2 products a cycle
  static constexpr int OFFSET = 0;

  GRAPHPRUNE_INLINE Ints dot(Ints sums, Ints inputs, Ints weights) {
#ifdef GRAPHPRUNE_SIMDE
    return (Ints)simde_mm512_dpbusd_epi32((simde__m512i)sums, (simde__m512i)inputs,
                                          (simde__m512i)weights);
#else
    return (Ints)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)inputs, (__m512i)weights);
#endif
  }

  GRAPHPRUNE_INLINE Floats fma(Floats a, Floats b, Floats c) {
#ifdef GRAPHPRUNE_SIMDE
    return (Floats)simde_mm512_fmadd_ps((simde__m512)a, (simde__m512)b, (simde__m512)c);
#else
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#endif
  }
};

}  // namespace graphprune

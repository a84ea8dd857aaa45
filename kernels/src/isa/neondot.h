// NEON with the dot product of Armv8.2: every Apple silicon, Cortex-A75 and later.
#pragma once

#include <arm_neon.h>

#include <cstdint>

#include "isa/inline.h"

namespace graphprune {

struct NeonDot {
  static constexpr int BYTES = 16;
  typedef float Floats __attribute__((vector_size(16)));
  typedef int32_t Ints __attribute__((vector_size(16)));
  typedef uint32_t Words __attribute__((vector_size(16)));
  typedef uint8_t Bytes __attribute__((vector_size(16)));

  static constexpr int TOKENS = 4, VECTORS = 4;  // 16 sums, 4 weights; at 6 tokens GCC spills
  static constexpr int CHAINS = 16;
  static constexpr int OFFSET = 128;  // SDOT takes signed inputs on both sides

  GRAPHPRUNE_INLINE Ints dot(Ints sums, Ints inputs, Ints weights) {
    return (Ints)vdotq_s32((int32x4_t)sums, (int8x16_t)inputs, (int8x16_t)weights);
  }

  GRAPHPRUNE_INLINE Floats fma(Floats a, Floats b, Floats c) {
    return (Floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
  }
};

}  // namespace graphprune

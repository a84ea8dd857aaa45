// No instruction set in particular: works everywhere, and is what the others are compared with.
#pragma once

#include <cstdint>

#include "isa/inline.h"

namespace graphprune {

struct Scalar {
  static constexpr int BYTES = 16;
  typedef float Floats __attribute__((vector_size(16)));
  typedef int32_t Ints __attribute__((vector_size(16)));
  typedef uint32_t Words __attribute__((vector_size(16)));
  typedef uint8_t Bytes __attribute__((vector_size(16)));

  static constexpr int TOKENS = 2, VECTORS = 1;
  static constexpr int CHAINS = 1;
  static constexpr int OFFSET = 0;

  // The low byte of each lane lies first in memory: the four bytes are taken out by shifts.
  GRAPHPRUNE_INLINE Ints dot(Ints sums, Ints inputs, Ints weights) {
    for (int byte = 0; byte < 4; ++byte) {
      sums += ((inputs >> (8 * byte)) & 255) * ((weights << (24 - 8 * byte)) >> 24);
    }
    return sums;
  }

  GRAPHPRUNE_INLINE Floats fma(Floats a, Floats b, Floats c) { return a * b + c; }
};

}  // namespace graphprune

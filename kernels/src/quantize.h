// Rows of float32 to uint8 codes, each row with the scale and the zero point of its own range.
//
// Up to four rows at once: their codes lie side by side in a panel, 16 bytes for four inputs.
#pragma once

#include <cfloat>

#include "kernel_set.h"
#include "vectors.h"

namespace graphprune {

template <class Isa>
struct Quantizer {
  using V = Vectors<Isa>;
  using Floats = typename V::Floats;
  using Ints = typename V::Ints;
  using Words = typename V::Words;
  static constexpr int LANES = V::LANES;
  static constexpr int64_t GROUPS = LANES / GROUP;  // of a vector

  // The range of a row, 0 included.
  struct Range {
    float low, high;
    bool finite;
  };

  struct Ranges {
    Floats low = {}, high = {};
    Floats zero = {};  // NaN in lanes that saw NaN or infinity: these times 0 are NaN

    GRAPHPRUNE_INLINE_MEMBER void add(Floats x) {
      low = V::smaller(x, low);
      high = V::larger(x, high);
      zero = Isa::fma(x, V::all(0.0f), zero);
    }

    GRAPHPRUNE_INLINE_MEMBER Range over_lanes() const {
      return {
          V::over_lanes(low, [](Floats a, Floats b) { return V::smaller(a, b); }),
          V::over_lanes(high, [](Floats a, Floats b) { return V::larger(a, b); }),
          V::over_lanes(zero, [](Floats a, Floats b) { return a + b; }) == 0,
      };
    }
  };

  struct Scale {
    float scale, inverse;
    int32_t zero;
  };

  GRAPHPRUNE_INLINE Scale scale_of(Range range) {
    // The halves are divided before they are added, or the sum might overflow; the least normal
    // number keeps the inverse finite.
    const float wanted = range.high / 255 - range.low / 255;
    const float scale = wanted > FLT_MIN ? wanted : FLT_MIN;
    const float inverse = 1 / scale;
    return {scale, inverse, V::rounded(V::all(-range.low * inverse))[0]};
  }

  // Not below 0, since the lowest of a row becomes 0, but maybe 256. Unsigned, so that NaN
  // becomes a byte too.
  GRAPHPRUNE_INLINE Words codes_of(Floats x, Scale s) {
    const Ints moved = (Ints)(x * s.inverse + V::SHIFT) + (s.zero - V::SHIFT_BITS);
    return V::smaller((Words)moved, Words{} + 255u);
  }

  // Writes the codes of a vector of each row to `groups` groups that are `stride` bytes apart.
  template <int ROWS>
  GRAPHPRUNE_INLINE void write(uint8_t* to, int64_t stride, const Floats (&x)[ROWS],
                               const Scale (&scales)[ROWS], int64_t groups) {
    Words bytes = {};  // byte r of a lane is of row r
    GRAPHPRUNE_UNROLL
    for (int r = 0; r < ROWS; ++r) bytes |= codes_of(x[r], scales[r]) << (8 * r);
    const Ints codes = V::transposed((Ints)(bytes ^ Isa::OFFSET * 0x01010101u));
    write_groups<ROWS>(to, stride, codes, groups, std::make_integer_sequence<int, GROUPS>());
  }
  template <int ROWS, int... G>
  GRAPHPRUNE_INLINE void write_groups(uint8_t* to, int64_t stride, Ints codes, int64_t groups,
                                      std::integer_sequence<int, G...>) {
    ((G < groups ? V::template store_part<G>(to + G * stride, codes, ROWS * GROUP) : void()), ...);
  }

  // Measures rows and keeps the scale and the zero point of each.
  template <int ROWS>
  GRAPHPRUNE_INLINE void measure(const float* x, const Rows& rows, int64_t token,
                                 Scale (&scales)[ROWS]) {
    const int64_t whole = rows.inputs / LANES * LANES, rest = rows.inputs - whole;
    Ranges ranges[ROWS];
    for (int64_t i = 0; i < whole; i += LANES) {
      GRAPHPRUNE_UNROLL
      for (int r = 0; r < ROWS; ++r) ranges[r].add(V::load(x + r * rows.inputs + i));
    }
    GRAPHPRUNE_UNROLL
    for (int r = 0; r < ROWS; ++r) {
      if (rest) ranges[r].add(V::load_some(x + r * rows.inputs + whole, rest));
      const Range range = ranges[r].over_lanes();
      scales[r] = scale_of(range.finite ? range : Range{0, 0, true});
      rows.scales[token + r] = range.finite ? scales[r].scale : __builtin_nanf("");
      rows.zeros[token + r] = scales[r].zero - Isa::OFFSET;
    }
  }

  // The rows x, of `token` and those after it, to a panel from `to` on. Padding is zero like x,
  // whose code is the zero point, so that it counts nothing.
  template <int ROWS>
  GRAPHPRUNE_INLINE void quantize_rows(const float* x, const Rows& rows, int64_t token, uint8_t* to,
                                       int64_t stride) {
    const int64_t whole = rows.inputs / LANES * LANES, rest = rows.inputs - whole;
    Scale scales[ROWS];
    Floats values[ROWS];
    measure(x, rows, token, scales);
    for (int64_t i = 0; i < whole; i += LANES, to += GROUPS * stride) {
      GRAPHPRUNE_UNROLL
      for (int r = 0; r < ROWS; ++r) values[r] = V::load(x + r * rows.inputs + i);
      write(to, stride, values, scales, GROUPS);
    }
    if (!rest) return;
    for (int r = 0; r < ROWS; ++r) values[r] = V::load_some(x + r * rows.inputs + whole, rest);
    write(to, stride, values, scales, (rest + GROUP - 1) / GROUP);
  }
};

}  // namespace graphprune

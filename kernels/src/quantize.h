// Rows of float32 to uint8 codes, each row with the scale and the zero point of its own range.
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
  static constexpr int LANES = V::LANES;

  // The range of a row, 0 included.
  struct Range {
    float low, high;
    bool finite;
  };

  struct Ranges {
    Floats low = {}, high = {};
    Ints strange = {};  // ones in lanes that saw NaN or infinity

    GRAPHPRUNE_INLINE_MEMBER void add(Floats x) {
      low = V::smaller(x, low);
      high = V::larger(x, high);
      strange |= ((Ints)x & 0x7fffffff) > 0x7f7fffff;
    }

    GRAPHPRUNE_INLINE_MEMBER Range over_lanes() const {
      Range range = {0, 0, true};
      for (int i = 0; i < LANES; ++i) {
        range.low = low[i] < range.low ? low[i] : range.low;
        range.high = high[i] > range.high ? high[i] : range.high;
        range.finite &= strange[i] == 0;
      }
      return range;
    }
  };

  GRAPHPRUNE_INLINE Range range_of(const float* x, int64_t inputs) {
    Ranges ranges;
    int64_t i = 0;
    for (; i + LANES <= inputs; i += LANES) ranges.add(V::load(x + i));
    ranges.add(V::load_some(x + i, inputs - i));
    return ranges.over_lanes();
  }

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
    const Floats zero = V::round(V::all(-range.low * inverse));
    return {scale, inverse, static_cast<int32_t>(zero[0])};
  }

  GRAPHPRUNE_INLINE Ints codes_of(Floats x, Scale s) {
    const Ints moved = __builtin_convertvector(V::round(x * s.inverse), Ints) + s.zero;
    return V::smaller(V::larger(moved, V::all(0)), V::all(255)) - Isa::OFFSET;
  }

  // Writes codes of `count` inputs to groups that are `stride` bytes apart. Padding is zero like
  // x, whose code is the zero point, so that it counts nothing.
  GRAPHPRUNE_INLINE void spread(uint8_t* to, int64_t stride, Ints codes, int64_t count) {
    const Ints groups = V::low_bytes(codes);
    GRAPHPRUNE_UNROLL
    for (int g = 0; g < LANES / GROUP; ++g) {
      if (g * GROUP >= count) return;
      const int32_t four = groups[g * GROUP];
      std::memcpy(to + g * stride, &four, sizeof four);
    }
  }

  GRAPHPRUNE_INLINE void quantize_row(const float* x, const Rows& rows, int64_t token, uint8_t* to,
                                      int64_t stride) {
    const Range range = range_of(x, rows.inputs);
    const Scale s = scale_of(range.finite ? range : Range{0, 0, true});
    rows.scales[token] = range.finite ? s.scale : __builtin_nanf("");
    rows.zeros[token] = s.zero - Isa::OFFSET;
    constexpr int64_t GROUPS = LANES / GROUP;
    int64_t i = 0;
    for (; i + LANES <= rows.inputs; i += LANES, to += GROUPS * stride) {
      spread(to, stride, codes_of(V::load(x + i), s), LANES);
    }
    const int64_t rest = rows.inputs - i;
    if (rest > 0) spread(to, stride, codes_of(V::load_some(x + i, rest), s), rest);
  }
};

}  // namespace graphprune

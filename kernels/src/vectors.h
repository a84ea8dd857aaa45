// What is common to vectors of all widths, in the vector extensions of GCC and Clang.
//
// All is in templates over an instruction set (isa/*.h). Nothing of the standard library that is
// inline may be called here: each file that includes this is compiled for other instructions, and
// the linker would keep one copy of std::min for all, maybe that with AVX-512.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>  // sequences of numbers: types, no functions

#include "isa/inline.h"

namespace graphprune {

template <class Isa>
struct Vectors {
  using Floats = typename Isa::Floats;
  using Ints = typename Isa::Ints;
  using Words = typename Isa::Words;
  using Bytes = typename Isa::Bytes;
  static constexpr int LANES = Isa::BYTES / 4;

  GRAPHPRUNE_INLINE Floats load(const float* from) {
    Floats v;
    std::memcpy(&v, from, sizeof v);
    return v;
  }
  GRAPHPRUNE_INLINE Ints load(const int32_t* from) {
    Ints v;
    std::memcpy(&v, from, sizeof v);
    return v;
  }
  GRAPHPRUNE_INLINE Ints load(const int8_t* from) {
    Ints v;
    std::memcpy(&v, from, sizeof v);
    return v;
  }
  GRAPHPRUNE_INLINE Floats load_some(const float* from, int64_t count) {
    Floats v = {};
    std::memcpy(&v, from, count * sizeof(float));
    return v;
  }
  GRAPHPRUNE_INLINE void store(float* to, Floats v) { std::memcpy(to, &v, sizeof v); }
  GRAPHPRUNE_INLINE void store_some(float* to, Floats v, int64_t count) {
    if (count >= LANES) return store(to, v);
    if (count > 0) std::memcpy(to, &v, count * sizeof(float));
  }

  // In each 16 bytes, which lie in memory as 4 by 4: the transpose. One instruction everywhere.
  GRAPHPRUNE_INLINE Ints transposed(Ints v) {
    return transposed((Bytes)v, std::make_integer_sequence<int, Isa::BYTES>());
  }
  template <int... BYTE>
  GRAPHPRUNE_INLINE Ints transposed(Bytes v, std::integer_sequence<int, BYTE...>) {
    return (Ints)__builtin_shufflevector(v, v, (BYTE / 16 * 16 + BYTE % 4 * 4 + BYTE % 16 / 4)...);
  }

  // Writes the first `count` bytes of part PART of 16 bytes.
  template <int PART>
  GRAPHPRUNE_INLINE void store_part(uint8_t* to, Ints v, int64_t count) {
    constexpr int FIRST = PART * 4;
    const auto part = __builtin_shufflevector(v, v, FIRST, FIRST + 1, FIRST + 2, FIRST + 3);
    std::memcpy(to, &part, count);
  }

  // f over all lanes, in each lane; f has to be commutative.
  template <class Function>
  GRAPHPRUNE_INLINE float over_lanes(Floats v, const Function& f) {
    return over_lanes<LANES / 2>(v, f, std::make_integer_sequence<int, LANES>());
  }
  template <int HALF, class Function, int... LANE>
  GRAPHPRUNE_INLINE float over_lanes(Floats v, const Function& f,
                                     std::integer_sequence<int, LANE...> lanes) {
    if constexpr (HALF > 0) {
      v = f(v, __builtin_shufflevector(v, v, ((LANE + HALF) % LANES)...));
      return over_lanes<HALF / 2>(v, f, lanes);
    }
    return v[0];
  }

  GRAPHPRUNE_INLINE Floats all(float x) { return x - Floats{}; }
  GRAPHPRUNE_INLINE Ints all(int32_t x) { return x - Ints{}; }
  // Four codes of a token, to every lane.
  GRAPHPRUNE_INLINE Ints all(const uint8_t* four) {
    int32_t x;
    std::memcpy(&x, four, sizeof x);
    return all(x);
  }

  // Where a is NaN, b.
  template <class Vector>
  GRAPHPRUNE_INLINE Vector larger(Vector a, Vector b) {
    return a > b ? a : b;
  }
  template <class Vector>
  GRAPHPRUNE_INLINE Vector smaller(Vector a, Vector b) {
    return a < b ? a : b;
  }
  GRAPHPRUNE_INLINE Floats magnitude(Floats x) { return (Floats)((Ints)x & 0x7fffffff); }

  // To the nearest, halves to even, for |x| < 2^22: after 1.5 * 2^23 is added no bit is left
  // for a fraction, and the lowest bits are the integer.
  static constexpr float SHIFT = 12582912.0f;
  static constexpr int32_t SHIFT_BITS = 0x4b400000;
  GRAPHPRUNE_INLINE Floats round(Floats x) { return (x + SHIFT) - SHIFT; }
  GRAPHPRUNE_INLINE Ints rounded(Floats x) { return (Ints)(x + SHIFT) - SHIFT_BITS; }

  // The highest power's factor comes first.
  template <int COUNT>
  GRAPHPRUNE_INLINE Floats polynomial(const float (&factors)[COUNT], Floats x) {
    Floats sum = all(factors[0]);
    GRAPHPRUNE_UNROLL
    for (int i = 1; i < COUNT; ++i) sum = Isa::fma(sum, x, all(factors[i]));
    return sum;
  }

  // e^x for x <= 0 with a relative error of about 2e-7; 0 below -87.
  //
  //     e^x = 2^n e^r,   n = round(x / ln 2),   |r| <= ln 2 / 2: the Taylor series to r^7
  GRAPHPRUNE_INLINE Floats exp(Floats x) {
    constexpr float LN2_HIGH = 0x1.62e4p-1f, LN2_LOW = 0x1.7f7d1cp-20f;  // ln 2 = high + low
    const Ints is_zero = x < -87.0f;
    x = larger(x, all(-87.0f));
    const Floats n = round(x * 0x1.715476p0f);
    const Floats r = Isa::fma(n, all(-LN2_LOW), Isa::fma(n, all(-LN2_HIGH), x));
    constexpr float TAYLOR[] = {1.0f / 5040, 1.0f / 720, 1.0f / 120, 1.0f / 24,
                                1.0f / 6,    0.5f,       1.0f,       1.0f};
    const Ints exponent = (__builtin_convertvector(n, Ints) + 127) << 23;
    return (Floats)((Ints)(polynomial(TAYLOR, r) * (Floats)exponent) & ~is_zero);
  }

  // NaN stays NaN: it is not less than zero.
  GRAPHPRUNE_INLINE Floats relu(Floats x) { return x < 0.0f ? all(0.0f) : x; }

  // x / (1 + e^-x), by a power that does not overflow.
  GRAPHPRUNE_INLINE Floats silu(Floats x) {
    const Floats power = exp(-magnitude(x));
    const Floats part = (x < 0.0f ? power : all(1.0f)) / (1.0f + power);
    return x < -87.0f ? all(0.0f) : x * part;  // minus infinity times 0 would be NaN
  }

  // x (1 + erf(x / sqrt 2)) / 2 = relu(x) - |x| erfc(|x| / sqrt 2) / 2, without cancellation.
  //
  //     erfc(a) = (c1 t + ... + c5 t^5) e^(-a^2),   t = 1 / (1 + 0.3275911 a)
  //
  // with an error below 1.5e-7: Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26.
  GRAPHPRUNE_INLINE Floats gelu(Floats x) {
    const Floats size = smaller(magnitude(x), all(32.0f));  // erfc is 0 there, and infinity * 0 NaN
    const Floats a = size * 0.70710678f;
    const Floats t = 1.0f / Isa::fma(a, all(0.3275911f), all(1.0f));
    constexpr float FACTORS[] = {1.061405429f, -1.453152027f, 1.421413741f, -0.284496736f,
                                 0.254829592f};
    return relu(x) - size * 0.5f * (polynomial(FACTORS, t) * t * exp(-(a * a)));
  }
};

}  // namespace graphprune

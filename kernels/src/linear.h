// y = act((sum of (code - zero) * weight) * scale of the token * scale of the output + bias)
//
// A tile holds the sums of some tokens and some vectors of outputs in registers while it goes once
// through the blocks of a strip. Each block adds, to every lane, the products of four inputs.
#pragma once

#include "kernel_set.h"
#include "quantize.h"
#include "vectors.h"

namespace graphprune {

template <class Isa>
struct Linear {
  using V = Vectors<Isa>;
  using Floats = typename V::Floats;
  using Ints = typename V::Ints;
  static constexpr int LANES = V::LANES;

  template <int TOKENS, int VECTORS>
  struct Sums {
    Ints of[TOKENS][VECTORS] = {};

    // A block's weights times what the tokens have for its four inputs. The fewer of the two stay
    // in registers meanwhile.
    GRAPHPRUNE_INLINE_MEMBER void add(const int8_t* block, const uint8_t* inputs) {
      if constexpr (TOKENS < VECTORS) {
        Ints held[TOKENS];
        GRAPHPRUNE_UNROLL
        for (int t = 0; t < TOKENS; ++t) held[t] = V::all(inputs + t * GROUP);
        GRAPHPRUNE_UNROLL
        for (int v = 0; v < VECTORS; ++v) {
          const Ints weights = V::load(block + v * Isa::BYTES);
          GRAPHPRUNE_UNROLL
          for (int t = 0; t < TOKENS; ++t) of[t][v] = Isa::dot(of[t][v], held[t], weights);
        }
      } else {
        Ints held[VECTORS];
        GRAPHPRUNE_UNROLL
        for (int v = 0; v < VECTORS; ++v) held[v] = V::load(block + v * Isa::BYTES);
        GRAPHPRUNE_UNROLL
        for (int t = 0; t < TOKENS; ++t) {
          const Ints four = V::all(inputs + t * GROUP);
          GRAPHPRUNE_UNROLL
          for (int v = 0; v < VECTORS; ++v) of[t][v] = Isa::dot(of[t][v], four, held[v]);
        }
      }
    }

    // Instead of zero points that are subtracted from codes: `output` is the first one, `zeros` are
    // the tokens'.
    GRAPHPRUNE_INLINE_MEMBER void subtract_zeros(const Packed& p, int64_t output,
                                                 const int32_t* zeros) {
      GRAPHPRUNE_UNROLL
      for (int v = 0; v < VECTORS; ++v) {
        const Ints row_sums = V::load(p.row_sums + output + v * LANES);
        GRAPHPRUNE_UNROLL
        for (int t = 0; t < TOKENS; ++t) of[t][v] -= row_sums * zeros[t];
      }
    }

    GRAPHPRUNE_INLINE_MEMBER void add(const Sums& other) {
      GRAPHPRUNE_UNROLL
      for (int t = 0; t < TOKENS; ++t) {
        GRAPHPRUNE_UNROLL
        for (int v = 0; v < VECTORS; ++v) of[t][v] += other.of[t][v];
      }
    }
  };

  // The sums of a strip from `output` on, over the codes of a panel. A few tokens are added in CHUNKS
  // chains, because a product waits for the one before it in its chain.
  template <int TOKENS, int VECTORS, int CHUNKS>
  GRAPHPRUNE_INLINE Sums<TOKENS, VECTORS> add_strip(const Packed& p, const Rows& rows, int64_t strip,
                                                    int64_t token, int64_t output) {
    const uint8_t* const panel = rows.panel(token);
    const int8_t* block = p.blocks + p.starts[strip] * p.block_bytes() +
                          (output - strip * p.height) * GROUP;
    Sums<TOKENS, VECTORS> sums[CHUNKS];
    sums[0].subtract_zeros(p, output, rows.zeros + token);
    const int32_t* column = p.columns + p.starts[strip];
    const int32_t* const last = p.columns + p.starts[strip + 1];
    const int64_t bytes = p.block_bytes();
    if constexpr (CHUNKS > 1) {
      for (; last - column >= CHUNKS; column += CHUNKS, block += CHUNKS * bytes) {
        GRAPHPRUNE_UNROLL
        for (int c = 0; c < CHUNKS; ++c) {
          sums[c].add(block + c * bytes, panel + int64_t{column[c]} * (TOKENS * GROUP));
        }
      }
    }
    for (; column < last; ++column, block += bytes) {
      sums[0].add(block, panel + int64_t{*column} * (TOKENS * GROUP));
    }
    GRAPHPRUNE_UNROLL
    for (int c = 1; c < CHUNKS; ++c) sums[0].add(sums[c]);
    return sums[0];
  }

  // Sums to floats, without the activation. `output` is the first one, `token` the panel's. Only
  // the last strip may be cut, so that all others do without asking.
  template <int TOKENS, int VECTORS, bool CUT>
  GRAPHPRUNE_INLINE void finish(const Packed& p, const Rows& rows, const Sums<TOKENS, VECTORS>& sums,
                                int64_t token, int64_t output, float* y) {
    const float* const token_scales = rows.scales + token;
    const int64_t stride = p.outputs, left = p.outputs - output;
    y += token * stride + output;
    GRAPHPRUNE_UNROLL
    for (int v = 0; v < VECTORS; ++v) {
      const int64_t o = output + v * LANES;
      const Floats scales = V::load(p.scales + o);
      const Floats bias = p.bias ? V::load(p.bias + o) : V::all(0.0f);
      GRAPHPRUNE_UNROLL
      for (int t = 0; t < TOKENS; ++t) {
        const Floats scale = scales * token_scales[t];
        const Floats value = __builtin_convertvector(sums.of[t][v], Floats) * scale + bias;
        float* const to = y + t * stride + v * LANES;
        CUT ? V::store_some(to, value, left - v * LANES) : V::store(to, value);
      }
    }
  }

  template <int TOKENS, int HEIGHT>
  GRAPHPRUNE_INLINE void multiply_panel(const Packed& p, const Rows& rows, int64_t strip,
                                        int64_t token, float* y) {
    constexpr int WHOLE = HEIGHT / LANES;
    constexpr int VECTORS = TOKENS == 1 || WHOLE < Isa::VECTORS ? WHOLE : Isa::VECTORS;
    constexpr int SUMS = TOKENS * VECTORS;
    constexpr int CHUNKS = SUMS < Isa::CHAINS ? Isa::CHAINS / SUMS : 1;
    for (int part = 0; part < WHOLE; part += VECTORS) {
      const int64_t output = strip * HEIGHT + part * LANES;
      const auto sums = add_strip<TOKENS, VECTORS, CHUNKS>(p, rows, strip, token, output);
      if (output + VECTORS * LANES <= p.outputs) {
        finish<TOKENS, VECTORS, false>(p, rows, sums, token, output, y);
      } else {
        finish<TOKENS, VECTORS, true>(p, rows, sums, token, output, y);
      }
    }
  }

  // Calls f.template operator()<TOKENS>(first token) for each panel.
  template <class Function>
  GRAPHPRUNE_INLINE void each_panel(int64_t tokens, const Function& f) {
    int64_t token = 0;
    for (; token + Isa::TOKENS <= tokens; token += Isa::TOKENS) {
      f.template operator()<Isa::TOKENS>(token);
    }
    if constexpr (Isa::TOKENS > 4) {
      for (; token + 4 <= tokens; token += 4) f.template operator()<4>(token);
    }
    for (; token < tokens; ++token) f.template operator()<1>(token);
  }

  // Activates `count` outputs of each token in place.
  template <class Function>
  GRAPHPRUNE_INLINE void activate_by(const Function& f, float* y, int64_t stride, int64_t tokens,
                                     int64_t count) {
    for (int64_t t = 0; t < tokens; ++t, y += stride) {
      int64_t i = 0;
      for (; i + LANES <= count; i += LANES) V::store(y + i, f(V::load(y + i)));
      if (i < count) V::store_some(y + i, f(V::load_some(y + i, count - i)), count - i);
    }
  }

  static void activate(Activation activation, float* y, int64_t stride, int64_t tokens,
                       int64_t count) {
    switch (activation) {
      case Activation::none:
        return;
      case Activation::gelu:
        return activate_by([](Floats x) { return V::gelu(x); }, y, stride, tokens, count);
      case Activation::relu:
        return activate_by([](Floats x) { return V::relu(x); }, y, stride, tokens, count);
      case Activation::silu:
        return activate_by([](Floats x) { return V::silu(x); }, y, stride, tokens, count);
    }
  }

  // A strip's weights stay in the nearest cache while all tokens pass by.
  template <int HEIGHT>
  static void multiply_strips(const Packed& p, const Rows& rows, int64_t first, int64_t last,
                              float* y) {
    for (int64_t strip = first; strip < last; ++strip) {
      each_panel(rows.tokens, [&]<int TOKENS>(int64_t token) __attribute__((always_inline)) {
        multiply_panel<TOKENS, HEIGHT>(p, rows, strip, token, y);
      });
      const int64_t output = strip * HEIGHT;
      const int64_t count = p.outputs - output < HEIGHT ? p.outputs - output : HEIGHT;
      activate(p.activation, y + output, p.outputs, rows.tokens, count);
    }
  }

  static void multiply(const Packed& p, const Rows& rows, int64_t first, int64_t last, float* y) {
    p.height == 16 ? multiply_strips<16>(p, rows, first, last, y)
                   : multiply_strips<32>(p, rows, first, last, y);
  }

  static void quantize(const float* x, const Rows& rows) {
    each_panel(rows.tokens, [&]<int TOKENS>(int64_t token) {
      constexpr int ROWS = TOKENS < 4 ? TOKENS : 4;
      static_assert(TOKENS % ROWS == 0);
      for (int t = 0; t < TOKENS; t += ROWS) {
        Quantizer<Isa>::template quantize_rows<ROWS>(x + (token + t) * rows.inputs, rows, token + t,
                                                     rows.panel(token) + t * GROUP, TOKENS * GROUP);
      }
    });
  }
};

template <class Isa>
constexpr KernelSet kernel_set(const char* name, int exact_bits) {
  return {name, exact_bits, Linear<Isa>::quantize, Linear<Isa>::multiply};
}

}  // namespace graphprune

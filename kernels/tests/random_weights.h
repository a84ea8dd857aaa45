// Random packed weights for the tests.
#pragma once

#include <random>
#include <vector>

#include "validate.h"

namespace graphprune {

struct Weights {
  std::vector<int8_t> blocks;
  std::vector<int32_t> columns, starts;
  std::vector<float> scales, bias;
  std::vector<int32_t> row_sums;
  int64_t blocks_shape[3], columns_shape[1], starts_shape[1], scales_shape[1], bias_shape[1];
  Claims claims;
};

using Random = std::mt19937;

inline int64_t between(Random& random, int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(random);
}

inline float normal(Random& random) { return std::normal_distribution<float>()(random); }

// Call it again after the arrays have changed.
inline void claim(Weights& w, int64_t height) {
  const auto size = [](const auto& v) { return static_cast<int64_t>(v.size()); };
  w.blocks_shape[0] = size(w.blocks) / (height * GROUP);
  w.blocks_shape[1] = height;
  w.blocks_shape[2] = GROUP;
  w.columns_shape[0] = size(w.columns);
  w.starts_shape[0] = size(w.starts);
  w.scales_shape[0] = size(w.scales);
  w.bias_shape[0] = size(w.bias);
  w.claims.blocks = {w.blocks.data(), w.blocks_shape, 3};
  w.claims.columns = {w.columns.data(), w.columns_shape, 1};
  w.claims.starts = {w.starts.data(), w.starts_shape, 1};
  w.claims.scales = {w.scales.data(), w.scales_shape, 1};
  w.claims.bias = {w.bias.data(), w.bias_shape, 1};
  w.claims.has_bias = !w.bias.empty();
}

inline void random_weights(Random& random, Weights& w, int64_t outputs, int64_t inputs,
                           int64_t height, int64_t bits, double density) {
  const int64_t strips = (outputs + height - 1) / height;
  const int64_t groups = (inputs + GROUP - 1) / GROUP;
  const int largest = bits == 7 ? 64 : 127;
  w.starts = {0};
  for (int64_t s = 0; s < strips; ++s) {
    for (int64_t g = 0; g < groups; ++g) {
      if (std::uniform_real_distribution<>()(random) >= density) continue;
      w.columns.push_back(static_cast<int32_t>(g));
      for (int64_t i = 0; i < height * GROUP; ++i) {
        w.blocks.push_back(static_cast<int8_t>(between(random, -largest, largest)));
      }
    }
    w.starts.push_back(static_cast<int32_t>(w.columns.size()));
  }
  for (int64_t i = 0; i < strips * height; ++i) {
    w.scales.push_back(0.001f + std::uniform_real_distribution<float>(0, 0.01f)(random));
  }
  if (between(random, 0, 1)) {
    for (int64_t i = 0; i < strips * height; ++i) w.bias.push_back(normal(random));
  }
  w.claims.outputs = outputs;
  w.claims.inputs = inputs;
  w.claims.bits = bits;
  claim(w, height);
}

// The claims have to be valid.
inline Packed packed(Weights& w, Activation activation) {
  Packed p = packed_of(w.claims, activation);
  w.row_sums.resize(p.strips() * p.height);
  add_up_rows(p, w.row_sums.data());
  p.row_sums = w.row_sums.data();
  return p;
}

}  // namespace graphprune

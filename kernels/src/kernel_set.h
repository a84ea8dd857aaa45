// What each instruction set offers: the same two functions.
#pragma once

#include <cstddef>
#include <cstdint>

#include "packed.h"

namespace graphprune {

// Tokens quantized by themselves: x = (code - zero) * scale, code 0 to 255.
//
// Codes lie in panels of as many tokens as a kernel holds sums of. A panel is
// [groups, tokens, GROUP]: what a block multiplies lies side by side, at constant distances.
// A token with NaN or infinity has the scale NaN.
struct Rows {
  int64_t tokens;
  int64_t inputs;
  uint8_t* codes;
  float* scales;
  int32_t* zeros;  // less what the kernel has subtracted from the codes

  int64_t groups() const { return (inputs + GROUP - 1) / GROUP; }
  uint8_t* panel(int64_t token) const { return codes + token * groups() * GROUP; }
};

// Bytes to reserve for rows, aligned to 4.
inline size_t rows_bytes(int64_t tokens, int64_t inputs) {
  const size_t codes = (inputs + GROUP - 1) / GROUP * GROUP;
  return static_cast<size_t>(tokens) * (codes + sizeof(float) + sizeof(int32_t));
}

// Rows that lie in `memory` of rows_bytes.
inline Rows rows_in(void* memory, int64_t tokens, int64_t inputs) {
  auto* scales = static_cast<float*>(memory);
  auto* zeros = reinterpret_cast<int32_t*>(scales + tokens);
  return {tokens, inputs, reinterpret_cast<uint8_t*>(zeros + tokens), scales, zeros};
}

struct KernelSet {
  const char* name;
  int exact_bits;  // largest codes that it multiplies exactly: 7 bits are within +-64

  // Quantizes x [tokens, inputs].
  void (*quantize)(const float* x, const Rows& rows);

  // Writes the outputs of strips first to last - 1 to y [tokens, outputs].
  void (*multiply)(const Packed& packed, const Rows& rows, int64_t first, int64_t last, float* y);
};

// Those that are compiled, the fastest first; a null pointer ends them.
extern const KernelSet* const KERNEL_SETS[];

}  // namespace graphprune

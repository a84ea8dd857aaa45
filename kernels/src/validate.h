// Whether packed weights are what they should be, so that kernels never need to ask.
#pragma once

#include <cstddef>
#include <cstdint>

#include "packed.h"
#include "sentence.h"

namespace graphprune {

struct Tensor {
  const void* data = nullptr;
  const int64_t* dims = nullptr;
  size_t rank = 0;
};

// What a node of the model says, before any of it is believed. The element types are checked by
// ONNX Runtime: blocks int8; columns, starts int32; scales, bias float.
struct Claims {
  Tensor blocks, columns, starts, scales, bias;
  bool has_bias = false;
  int64_t outputs = 0;
  int64_t inputs = 0;
  int64_t bits = 0;
};

// Returns what is wrong, or an empty sentence. `exact_bits`: the codes that this CPU multiplies
// exactly, 7 or 8. Reads nothing outside the tensors, however wrong they are.
Sentence validate(const Claims& claims, int exact_bits);

// What a kernel reads, of claims that are valid; row_sums are still missing.
Packed packed_of(const Claims& claims, Activation activation);

// The sum of each output's codes, to `sums` [strips * height].
void add_up_rows(const Packed& packed, int32_t* sums);

}  // namespace graphprune

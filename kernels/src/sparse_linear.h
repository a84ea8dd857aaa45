// The operator SparseLinear of the domain graphprune, as ONNX Runtime calls it.
#pragma once

#include "ort.h"

namespace graphprune {

// ONNX Runtime hands `op` back when it asks for a shape, but not its functions.
struct SparseLinear {
  OrtCustomOp op;
  const OrtApi* api;
};

SparseLinear sparse_linear(const OrtApi* api);

}  // namespace graphprune

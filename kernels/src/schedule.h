// How the work of one call is divided among threads.
#pragma once

#include <cstdint>

#include "kernel_set.h"

namespace graphprune {

// Runs f(data, 0) to f(data, units - 1), on several threads or on one; false if it cannot.
struct Parallel {
  bool (*run)(const void* context, void (*f)(void* data, size_t unit), size_t units, void* data);
  const void* context;
};

enum class Outcome { done, out_of_memory, not_parallel };

// y [tokens, outputs] = SparseLinear(x [tokens, inputs]).
Outcome run_linear(const KernelSet& kernels, const Packed& packed, const float* x, int64_t tokens,
                   float* y, const Parallel& parallel);

}  // namespace graphprune

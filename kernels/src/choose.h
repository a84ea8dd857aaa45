// Which kernels this CPU runs.
#pragma once

#include "kernel_set.h"
#include "sentence.h"

namespace graphprune {

struct Choice {
  const KernelSet* kernels = nullptr;
  Sentence problem;  // where kernels is null
};

// Whether this CPU has the instructions of a set.
bool runs_here(const KernelSet& kernels);

// The fastest set that runs here, or the one that is named; null names none.
Choice choose(const char* name);

// What the environment variable GRAPHPRUNE_KERNELS_ISA chose when the library was loaded.
const Choice& chosen();

}  // namespace graphprune

#include "isa/neondot.h"

#include "linear.h"

namespace graphprune {

extern const KernelSet neondot;
constinit const KernelSet neondot = kernel_set<NeonDot>("neondot", 8);

}  // namespace graphprune

#include "isa/scalar.h"

#include "linear.h"

namespace graphprune {

extern const KernelSet scalar;
constinit const KernelSet scalar = kernel_set<Scalar>("scalar", 8);

}  // namespace graphprune

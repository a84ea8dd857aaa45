#include "isa/avx2.h"

#include "linear.h"

namespace graphprune {

extern const KernelSet avx2;
constinit const KernelSet avx2 = kernel_set<Avx2>("avx2", 7);

}  // namespace graphprune

#include "isa/avx512vnni.h"

#include "linear.h"

namespace graphprune {

extern const KernelSet avx512vnni;
constinit const KernelSet avx512vnni = kernel_set<Avx512Vnni>("avx512vnni", 8);

}  // namespace graphprune

#include "isa/avxvnni.h"

#include "linear.h"

namespace graphprune {

extern const KernelSet avxvnni;
constinit const KernelSet avxvnni = kernel_set<AvxVnni>("avxvnni", 8);

}  // namespace graphprune

// The kernels for VNNI with SIMDe's functions in the place of instructions, so that any CPU can
// test them.

// Other names than those of the real kernels, or the linker would keep one of both.
#define Avx512Vnni Avx512VnniBySimde
#define AvxVnni AvxVnniBySimde
#include "isa/avx512vnni.h"
#include "isa/avxvnni.h"
#include "linear.h"

namespace graphprune {

extern const KernelSet avx512vnni_simde, avxvnni_simde;
constinit const KernelSet avx512vnni_simde = kernel_set<Avx512Vnni>("avx512vnni (SIMDe)", 8);
constinit const KernelSet avxvnni_simde = kernel_set<AvxVnni>("avxvnni (SIMDe)", 8);

}  // namespace graphprune

#include "kernel_set.h"

namespace graphprune {

// Which there are is known to CMakeLists.txt.
#ifdef GRAPHPRUNE_HAS_X86
extern const KernelSet avx512vnni, avxvnni, avx2;
#endif
#ifdef GRAPHPRUNE_HAS_NEON
extern const KernelSet neondot;
#endif
extern const KernelSet scalar;

const KernelSet* const KERNEL_SETS[] = {
#ifdef GRAPHPRUNE_HAS_X86
    &avx512vnni, &avxvnni, &avx2,
#endif
#ifdef GRAPHPRUNE_HAS_NEON
    &neondot,
#endif
    &scalar, nullptr,
};

}  // namespace graphprune

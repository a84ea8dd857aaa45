#include "choose.h"

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace graphprune {
namespace {

#if defined(__x86_64__)

struct Registers {
  unsigned a = 0, b = 0, c = 0, d = 0;
};

bool bit(unsigned value, int number) { return value >> number & 1; }

// Zeros for a leaf that the CPU lacks. Asked for directly: the answers of GCC's own
// __builtin_cpu_supports lack AVX-VNNI in GCC 12 and differ in Clang.
Registers cpuid(unsigned leaf, unsigned subleaf) {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d);
  return r;
}

// Registers that the operating system saves: bits of XCR0.
__attribute__((target("xsave"))) unsigned saved_registers() {
  const bool can_ask = bit(cpuid(1, 0).c, 27);
  return can_ask ? static_cast<unsigned>(_xgetbv(0)) : 0;
}

bool has_avx2() {
  constexpr unsigned YMM = 0x6;
  const unsigned basic = cpuid(1, 0).c, extended = cpuid(7, 0).b;
  return (saved_registers() & YMM) == YMM && bit(basic, 12) /* FMA */ && bit(basic, 28) /* AVX */ &&
         bit(extended, 5) /* AVX2 */ && bit(extended, 8) /* BMI2 */;
}

bool has_avxvnni() { return has_avx2() && bit(cpuid(7, 1).a, 4); }

bool has_avx512vnni() {
  constexpr unsigned ZMM = 0xe6;
  const Registers r = cpuid(7, 0);
  return has_avx2() && (saved_registers() & ZMM) == ZMM && bit(r.b, 16) /* F */ &&
         bit(r.b, 17) /* DQ */ && bit(r.b, 30) /* BW */ && bit(r.b, 31) /* VL */ &&
         bit(r.c, 11) /* VNNI */;
}

bool has(const char* name) {
  if (std::strcmp(name, "avx512vnni") == 0) return has_avx512vnni();
  if (std::strcmp(name, "avxvnni") == 0) return has_avxvnni();
  return std::strcmp(name, "avx2") == 0 && has_avx2();
}

#elif defined(__aarch64__) && defined(__APPLE__)

bool has(const char* name) { return std::strcmp(name, "neondot") == 0; }

#elif defined(__aarch64__) && defined(__linux__)

bool has(const char* name) {
  constexpr unsigned long DOT_PRODUCT = 1ul << 20;  // HWCAP_ASIMDDP
  return std::strcmp(name, "neondot") == 0 && (getauxval(AT_HWCAP) & DOT_PRODUCT) != 0;
}

#else

bool has(const char*) { return false; }

#endif

Sentence unknown(const char* name) {
  Sentence known;
  for (auto set = KERNEL_SETS; *set; ++set) {
    known = sentence("%s%s%s", known.text, known ? ", " : "", (*set)->name);
  }
  return sentence("GRAPHPRUNE_KERNELS_ISA is '%s', which graphprune-kernels does not have: it has %s",
                  name, known.text);
}

// Chosen while the library is loaded, so that no lock is needed later.
const Choice CHOSEN = choose(std::getenv("GRAPHPRUNE_KERNELS_ISA"));

}  // namespace

bool runs_here(const KernelSet& kernels) {
  return std::strcmp(kernels.name, "scalar") == 0 || has(kernels.name);
}

Choice choose(const char* name) {
  const bool any = name == nullptr || *name == '\0';
  for (auto set = KERNEL_SETS; *set; ++set) {
    if (!any && std::strcmp((*set)->name, name) != 0) continue;
    if (runs_here(**set)) return {*set, {}};
    if (!any) {
      return {nullptr, sentence("GRAPHPRUNE_KERNELS_ISA is '%s', which this CPU lacks", name)};
    }
  }
  return {nullptr, unknown(name)};
}

const Choice& chosen() { return CHOSEN; }

}  // namespace graphprune

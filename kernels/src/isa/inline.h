// Inlining and unrolling that the kernels rely on.
#pragma once

// Vectors only pass between functions that are inlined, or their calling convention would matter.
#define GRAPHPRUNE_INLINE_MEMBER inline __attribute__((always_inline))
#define GRAPHPRUNE_INLINE static GRAPHPRUNE_INLINE_MEMBER

// Before a loop of constant length over vectors: without it GCC keeps arrays of them in memory at
// -O2.
#define GRAPHPRUNE_UNROLL _Pragma("GCC unroll 64")

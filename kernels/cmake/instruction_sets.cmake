# One object library per instruction set: only its own file is compiled with its flags, so that
# nothing else of the library needs the instructions.
#
# Sets KERNEL_LIBRARIES and KERNEL_DEFINITIONS.

function(add_kernels name)
  add_library(kernels_${name} OBJECT src/isa/${name}.cc)
  target_compile_options(kernels_${name} PRIVATE ${ARGN})
endfunction()

set(AVX2_FLAGS -mavx2 -mfma -mbmi2)

add_kernels(scalar)
set(KERNEL_LIBRARIES kernels_scalar)
set(KERNEL_DEFINITIONS)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$")
  add_kernels(avx2 ${AVX2_FLAGS})
  add_kernels(avxvnni ${AVX2_FLAGS} -mavxvnni)
  add_kernels(avx512vnni ${AVX2_FLAGS} -mavx512f -mavx512vl -mavx512bw -mavx512dq -mavx512vnni
    -mprefer-vector-width=512)
  list(APPEND KERNEL_LIBRARIES kernels_avx2 kernels_avxvnni kernels_avx512vnni)
  set(KERNEL_DEFINITIONS GRAPHPRUNE_HAS_X86)
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64)$")
  add_kernels(neondot -march=armv8.2-a+dotprod)
  list(APPEND KERNEL_LIBRARIES kernels_neondot)
  set(KERNEL_DEFINITIONS GRAPHPRUNE_HAS_NEON)
endif()

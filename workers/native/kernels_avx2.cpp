// x86-64 with avx2,fma,f16c.
#if defined(__x86_64__)
#include "standard.inc"
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define NAME(op) headrace_##op##_avx2
#define VBYTES 32
#include "kernels.inc"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

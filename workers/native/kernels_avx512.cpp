// x86-64 with avx2,fma,avx512f,avx512bw,avx512vl,avx512dq.
#if defined(__x86_64__)
#include "standard.inc"
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq")
#endif
#define NAME(op) headrace_##op##_avx512
#define VBYTES 64
#include "kernels.inc"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

// Any machine: four floats at a time (SSE2, NEON).
#define NAME(op) headrace_##op##_base
#define VBYTES 16
#include "kernels.inc"

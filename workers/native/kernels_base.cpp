// Any machine: four floats at a time (SSE2, NEON).
#include "standard.inc"

#define NAME(op) headrace_##op##_base
#define VBYTES 16
#include "kernels.inc"

// A digest of all sources, told by the build (setup.py).
extern "C" const char* headrace_sources() { return HEADRACE_SOURCES; }

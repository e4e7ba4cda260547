"""The native CPU kernels; everything else is in pyproject.toml.

Optional: without a C++ compiler the install goes on and the engine keeps to torch. OpenMP is compiled in but
not linked: the symbols come from the runtime that torch has mapped (workers/native says why).
"""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "workers.native._kernels",
            sources=[f"workers/native/kernels_{name}.cpp" for name in ("base", "avx2", "avx512")],
            depends=["workers/native/kernels.inc"],
            language="c++",
            optional=True,
            extra_compile_args=["-O3", "-std=c++17", "-fopenmp", "-g0", "-Wno-psabi", "-Wno-ignored-attributes"],
        )
    ]
)

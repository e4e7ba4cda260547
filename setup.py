"""The native CPU kernels; everything else is in pyproject.toml.

Optional: without a C++ compiler the install goes on and the engine keeps to torch.
"""

from pathlib import Path

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "workers.native._kernels",
            sources=[f"workers/native/kernels_{name}.cpp" for name in ("base", "avx2", "avx512")],
            depends=sorted(str(path) for path in Path("workers/native").glob("*.inc")),
            language="c++",
            optional=True,
            extra_compile_args=["-O3", "-std=c++17", "-pthread", "-g0", "-Wno-psabi", "-Wno-ignored-attributes"],
        )
    ]
)

"""The CPU kernels: one C++ source, one extension per instruction set, chosen at run time by models/ops/cpu.py.
Beside them the shared memory between ranks.

Optional: without a compiler the package installs and serves with the tiled torch kernels (C4) and gloo.
"""

import copy
import os
import pathlib
import platform

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

VARIANTS: dict[str, list[str]] = {"_cpu_base": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    V4 = ["-march=x86-64-v4", "-mprefer-vector-width=512"]
    VNNI = [*V4, "-mavx512vnni"]  # what multiplies bf16 has it, too
    VARIANTS |= {"_cpu_v3": ["-march=x86-64-v3"], "_cpu_v4": V4, "_cpu_v4_vnni": VNNI}
    VARIANTS |= {"_cpu_v4_bf16": [*VNNI, "-mavx512bf16"]}

# Exact kernels: an FMA is written, never contracted, and nothing is reassociated.
FLAGS = ["-std=c++20", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
FLAGS += ["-Wall", "-Wno-psabi", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]


class BuildVariants(build_ext):
    """As many at a time as there are cores. Objects of one source under different flags must not share a path."""

    def finalize_options(self) -> None:
        """See the base class."""
        super().finalize_options()
        self.parallel = self.parallel or len(os.sched_getaffinity(0))

    def build_extension(self, ext: Extension) -> None:
        """Compile `ext` in a folder of its own."""
        apart = copy.copy(self)  # several threads do this
        apart.build_temp = str(pathlib.Path(self.build_temp) / ext.name)
        super(BuildVariants, apart).build_extension(ext)


setup(
    cmdclass={"build_ext": BuildVariants},
    ext_modules=[
        Extension(
            f"models.ops.{name}",
            sources=["models/ops/cpu.cpp"],
            depends=sorted(str(path) for path in pathlib.Path("models/ops").glob("cpu_*.h")),
            define_macros=[("ARGOSY_MODULE", name)],
            extra_compile_args=[*FLAGS, *march],
            extra_link_args=["-pthread"],
            language="c++",
            optional=True,
        )
        for name, march in VARIANTS.items()
    ]
    + [
        Extension(
            "models.transports._shared_memory",
            sources=["models/transports/shared_memory.cpp"],
            depends=sorted(str(path) for path in pathlib.Path("models/transports").glob("shared_*.h")),
            extra_compile_args=FLAGS,
            extra_link_args=["-pthread"],
            language="c++",
            optional=True,
        )
    ],
)

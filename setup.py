"""Builds eva_kernels._core from csrc/: C++17 and pybind11, no torch headers. Metadata: pyproject.toml."""

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

SOURCES = ["csrc/allocation.cpp", "csrc/tracker.cpp", "csrc/bindings.cpp"]
# Contraction to fused multiply-adds would make results depend on the processor.
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wextra"]


class BuildExtension(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        ext.include_dirs.append(pybind11.get_include())
        super().build_extension(ext)


setup(
    packages=find_packages(include=["eva_kernels*"]) + find_packages("python"),
    ext_modules=[
        Extension(
            "eva_kernels._core",
            SOURCES,
            extra_compile_args=FLAGS,
            depends=["csrc/allocation.h", "csrc/tracker.h"],
            language="c++",
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)

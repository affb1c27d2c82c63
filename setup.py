"""Adds to pyproject.toml the compiled library: cp310-abi3 where there is nvcc, else pure Python."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import Extension, __version__, setup
from setuptools.command.build_ext import build_ext

# Without build isolation nobody else looks, and an older one calls pyproject.toml wrong.
if int(__version__.split(".")[0]) < 77:
    sys.exit(
        f"hf_flash_patch: setuptools is {__version__}, 77 or later is needed: "
        'pip install "setuptools>=77"'
    )

sys.path.insert(0, str(Path(__file__).resolve().parent))
import build_cuda


class BuildCuda(build_ext):
    """Lets build_cuda compile, and puts the library where setuptools wants it."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(build_cuda.build(build_cuda.find_toolchain())), str(target))


def extensions() -> list[Extension]:
    """The one extension, or none and a line that says why."""
    if os.environ.get("HFP_SKIP_CUDA", "0") != "0":
        return []
    if missing := build_cuda.find_toolchain().missing:
        print(
            f"hf_flash_patch: installing without CUDA kernels; missing: {'; '.join(missing)}",
            file=sys.stderr,
        )
        return []
    return [Extension("hf_flash_patch._C", sources=[], py_limited_api=True)]


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildCuda},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)

"""Compiles csrc/ into hf_flash_patch/_C.abi3.so: ninja, one translation unit an instance.

`python build_cuda.py` is `make build-cuda`; setup.py calls `build`. The library is built on torch's
stable ABI with the CUDA runtime linked statically, so neither a GPU nor a CUDA build of torch is
needed: only nvcc, ninja and torch's headers.

Environment: CUDA_HOME (where nvcc is, if not on PATH), MAX_JOBS (parallel compilations); for the
development of kernels HFP_ONLY (a regular expression: only instances are built whose name, such as
sm80_forward_bf16_64, it finds) and HFP_SPILLS=warn (complaints of ptxas don't fail the build).
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent
LIBRARY = "_C.abi3.so"

# Kernels of an architecture live in the folder of the oldest one they share their source with.
SOURCE_FOLDER = {"sm80": "sm80", "sm86": "sm80", "sm90": "sm90"}

# sm_80 machine code also runs on 8.6, 8.7 and 8.9; the PTX reaches every later GPU. Machine code
# for sm_90 saves Hopper the compilation at load, and sm_90a code (TMA, wgmma) runs nowhere else.
AMPERE_CODE = [f"arch=compute_80,code={code}" for code in ("sm_80", "sm_90", "compute_80")]
ARCH_CODE = {"sm80": AMPERE_CODE, "sm86": AMPERE_CODE, "sm90": ["arch=compute_90a,code=sm_90a"]}
# The two kernels of decode overlap from 9.0 on, where their code can ask for it.
DECODE_CODE = ["arch=compute_80,code=sm_80", "arch=compute_90,code=[sm_90,compute_90]"]

# One library for Python >= 3.10 and torch >= 2.10.
STABLE_ABI = [
    "-DUSE_CUDA",
    "-DPy_LIMITED_API=0x030a0000",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
]


class BuildError(RuntimeError):
    """The CUDA sources are wrong or could not be compiled."""


@dataclass(frozen=True)
class Instance:
    """One line `HFP_INSTANCE(arch, direction, dtype, head_dim)` of csrc/instances.def."""

    arch: str
    direction: str
    dtype: str
    head_dim: int

    @property
    def name(self) -> str:
        return f"{self.arch}_{self.direction}_{self.dtype}_{self.head_dim}"

    @property
    def arguments(self) -> str:
        return f"{self.arch}, {self.direction}, {self.dtype}, {self.head_dim}"

    @property
    def code(self) -> list[str]:
        """What nvcc's -gencode is given."""
        return DECODE_CODE if self.direction == "decode" else ARCH_CODE[self.arch]

    @property
    def source(self) -> str:
        return (
            f'#include "{SOURCE_FOLDER[self.arch]}/{self.direction}.h"\n'
            f"HFP_INSTANTIATE({self.arch}, {self.dtype}, {self.head_dim})\n"
        )


@dataclass(frozen=True)
class Toolchain:
    """The programs and headers a build needs; what was not found is None."""

    nvcc: str | None
    ninja: list[str] | None
    torch: Path | None

    @property
    def missing(self) -> list[str]:
        """What is missing and how to get it, one line each; empty if the build can start."""
        lines = []
        if self.nvcc is None:
            lines.append("nvcc (install the CUDA toolkit, and put nvcc on PATH or set CUDA_HOME)")
        if self.ninja is None:
            lines.append("ninja (pip install ninja)")
        if self.torch is None:
            lines.append(
                "torch in the build's own environment (pip install --no-build-isolation .)"
            )
        return lines


def find_toolchain() -> Toolchain:
    """Looks for nvcc, ninja and torch without importing any of them."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    nvcc = None
    for folder in [
        *(os.path.join(home, "bin") for home in homes if home),
        None,
        "/usr/local/cuda/bin",
    ]:
        nvcc = nvcc or shutil.which("nvcc", path=folder)
    ninja = None
    if shutil.which("ninja"):
        ninja = ["ninja"]
    elif importlib.util.find_spec("ninja"):
        ninja = [sys.executable, "-m", "ninja"]
    torch = importlib.util.find_spec("torch")
    folders = torch.submodule_search_locations if torch else None
    return Toolchain(nvcc=nvcc, ninja=ninja, torch=Path(folders[0]) if folders else None)


def read_instances(definition: Path, only: str = "") -> list[Instance]:
    """Reads csrc/instances.def.

    Raises:
        BuildError: a line that is neither an instance nor a comment, an unknown architecture, an
            instance given twice, or `only` matches no instance.
    """
    instances: list[Instance] = []
    for number, line in enumerate(definition.read_text().splitlines(), 1):
        line = line.split("//")[0].strip()
        if not line:
            continue
        where = f"{definition.name}:{number}"
        match = re.fullmatch(r"HFP_INSTANCE\((\w+), *(\w+), *(\w+), *(\d+)\)", line)
        if not match:
            expected = "HFP_INSTANCE(arch, direction, dtype, head_dim)"
            raise BuildError(f"{where}: expected {expected}, got {line}")
        instance = Instance(match[1], match[2], match[3], int(match[4]))
        if instance.arch not in SOURCE_FOLDER:
            known = ", ".join(SOURCE_FOLDER)
            raise BuildError(f"{where}: unknown architecture {instance.arch}; known: {known}")
        if instance in instances:
            raise BuildError(f"{where}: {instance.name} is there twice")
        instances.append(instance)
    chosen = [instance for instance in instances if re.search(only, instance.name)]
    if not chosen:
        raise BuildError(
            f"HFP_ONLY={only} matches none of: {' '.join(instance.name for instance in instances)}"
        )
    return chosen


def write_if_changed(path: Path, text: str) -> None:
    """Writes a file, but leaves its time stamp alone if it says this already."""
    if path.exists() and path.read_text() == text:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def ninja_file(
    toolchain: Toolchain, csrc: Path, folder: Path, instances: list[Instance]
) -> tuple[str, list[Path]]:
    """The text of build.ninja, and the log that nvcc leaves of each object."""
    assert toolchain.nvcc and toolchain.torch
    host = ["-fPIC", "-fvisibility=hidden", "-Wall"]
    include = [f"-I{csrc}", f"-I{folder / 'generated'}"]
    common = ["-O3", "-std=c++20", f"-Xcompiler={','.join(host)}", *include]
    device = [*common, "--expt-relaxed-constexpr", "-Xptxas=-v", "-Xfatbin=-compress-all"]
    torch_include = [f"-isystem={toolchain.torch / 'include'}"]
    link = ["-shared", "-cudart=static", f"-L{toolchain.torch / 'lib'}"]
    # torch is loaded with local symbols: the library must name it among what it needs, although
    # nothing here resolves to libtorch.so itself. What cudart brings along stays inside.
    link += [f"-Xlinker={flag}" for flag in ("--exclude-libs=ALL", "--no-as-needed")]
    libraries = ["-ltorch", "-ltorch_cpu", "-lc10"]

    lines = [
        "ninja_required_version = 1.5",
        f"nvcc = {shlex.quote(toolchain.nvcc)}",
        "rule compile",
        "  command = ($nvcc $flags -MD -MF $out.d -c $in -o $out > $out.log 2>&1"
        " || (cat $out.log; exit 1)) && (grep -A 3 warning $out.log || true)",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = $name",
        "rule link",
        f"  command = $nvcc {shlex.join(link)} $in {shlex.join(libraries)} -o $out",
        f"  description = {LIBRARY}",
    ]
    objects, logs = [], []

    def compile_(source: Path, name: str, flags: list[str]) -> None:
        objects.append(folder / "objects" / f"{name}.o")
        logs.append(folder / "objects" / f"{name}.o.log")
        lines.extend(
            [
                f"build {objects[-1]}: compile {source}",
                f"  name = {name}",
                f"  flags = {shlex.join(flags)}",
            ]
        )

    for instance in sorted(instances, key=lambda i: -i.head_dim):  # the slowest first
        gencode = [f"-gencode={code}" for code in instance.code]
        compile_(folder / "generated" / f"{instance.name}.cu", instance.name, [*device, *gencode])
    for source in sorted(csrc.glob("*.cu")):
        compile_(source, source.name, [*device, *(f"-gencode={code}" for code in AMPERE_CODE)])
    for source in sorted(csrc.glob("*.cpp")):
        compile_(source, source.name, [*common, *STABLE_ABI, *torch_include])

    lines.append(f"build objects: phony {' '.join(map(str, objects))}")
    lines.append(f"build {folder / LIBRARY}: link {' '.join(map(str, objects))}")
    return "\n".join(lines) + "\n", logs


def ptxas_complaints(logs: list[Path], csrc: Path) -> list[str]:
    """What ptxas noted that costs speed: spilled registers, and C75xx (such as wgmma serialised).

    A line `// ptxas-spill-ok(text, bytes): reason` anywhere in csrc accepts spills of up to so many
    bytes, stores or loads, in the kernels whose mangled name contains text.
    """
    sources = [path for path in csrc.rglob("*") if path.suffix in {".h", ".cu", ".cpp"}]
    accepted = [
        (text, int(limit))
        for path in sources
        for text, limit in re.findall(
            r"// ptxas-spill-ok\(([^,\n]+), *(\d+)\): \S", path.read_text()
        )
    ]
    complaints = []
    for log in logs:
        name = log.name.removesuffix(".o.log")
        kernel, arch = "", ""
        for line in log.read_text().splitlines():
            if match := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
                kernel, arch = match[1], match[2]
            elif match := re.search(r"Function properties for (\w+)", line):
                kernel = match[1]
            spilled = max(map(int, re.findall(r"(\d+) bytes spill", line)), default=0)
            if spilled:
                if not any(text in kernel and spilled <= limit for text, limit in accepted):
                    complaints.append(f"{name}: {arch} {kernel}: {line.strip()}")
            elif re.search(r"\bC75\d\d\b", line):
                complaints.append(f"{name}: {line.strip()}")
    return complaints


def build(
    toolchain: Toolchain,
    csrc: Path = ROOT / "csrc",
    folder: Path = ROOT / "build" / "cuda",
    only: str | None = None,
) -> Path:
    """Brings the library up to date.

    Args:
        toolchain: from `find_toolchain`, nothing missing.
        csrc: the sources.
        folder: where generated sources, objects and logs stay from one build to the next.
        only: as HFP_ONLY, which it defaults to.

    Returns:
        the path of the library inside `folder`.

    Raises:
        BuildError: wrong instances, a failed compilation (its output is printed), or complaints of
            ptxas that the sources don't accept.
    """
    only = os.environ.get("HFP_ONLY", "") if only is None else only
    instances = read_instances(csrc / "instances.def", only)
    for instance in instances:
        write_if_changed(folder / "generated" / f"{instance.name}.cu", instance.source)
    listing = "".join(f"HFP_INSTANCE({instance.arguments})\n" for instance in instances)
    write_if_changed(folder / "generated" / "instances_built.h", listing)
    text, logs = ninja_file(toolchain, csrc, folder, instances)
    write_if_changed(folder / "build.ninja", text)

    def ninja(target: str) -> None:
        assert toolchain.ninja
        cores = os.cpu_count() or 1
        jobs = min(int(os.environ.get("MAX_JOBS") or cores), cores)
        command = [*toolchain.ninja, "-f", str(folder / "build.ninja"), "-j", str(jobs), target]
        # ninja keeps its records (.ninja_log, .ninja_deps) where it runs.
        if subprocess.run(command, cwd=folder).returncode:
            raise BuildError(f"{shlex.join(command)} failed; what nvcc said is above")

    ninja("objects")
    if complaints := ptxas_complaints(logs, csrc):
        heading = (
            "ptxas complaints that no `// ptxas-spill-ok(kernel, bytes): reason` in csrc accepts:"
        )
        text = "\n  ".join([heading, *complaints])
        if os.environ.get("HFP_SPILLS") != "warn":
            raise BuildError(text)
        print(text, file=sys.stderr)
    ninja(str(folder / LIBRARY))
    return folder / LIBRARY


def main() -> int:
    """Builds and leaves the library in the package, for use from the source tree."""
    toolchain = find_toolchain()
    if toolchain.missing:
        print(
            "\n".join(f"build_cuda.py: missing {line}" for line in toolchain.missing),
            file=sys.stderr,
        )
        return 1
    start = time.monotonic()
    try:
        library = build(toolchain)
    except BuildError as error:
        print(f"build_cuda.py: {error}", file=sys.stderr)
        return 1
    target = ROOT / "hf_flash_patch" / LIBRARY
    # A process that has the old file open keeps it: replace, never overwrite.
    shutil.copyfile(library, target.with_suffix(".new"))
    os.replace(target.with_suffix(".new"), target)
    size, seconds = target.stat().st_size / 1e6, time.monotonic() - start
    print(f"{target.relative_to(ROOT)}: {size:.1f} MB in {seconds:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())

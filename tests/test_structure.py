"""What may be where: layers, one launch path, torch at the edge, sizes in one list, docstrings."""

import ast
import re
from pathlib import Path

import pytest

import hf_flash_patch as hfp

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "hf_flash_patch"
CSRC = ROOT / "csrc"
MODULES = sorted(PACKAGE.rglob("*.py"))
KERNEL_SOURCES = sorted(p for p in CSRC.rglob("*") if p.suffix in {".h", ".cu", ".cpp", ".def"})
MAX_LINES = 500

# Each part of the package, and the parts that it may import; one direction only.
MAY_IMPORT = {
    "errors": set(),
    "families": set(),
    "report": set(),
    "context": {"errors", "families", "integration", "report"},
    "masks": {"errors"},
    "ops": {"errors", "masks"},
    "integration": {"errors", "families", "masks", "ops"},
    "memory": {"errors", "integration", "ops"},
    "parallel": {"errors", "families", "integration", "masks", "ops"},
    "patch": {"context", "errors", "families", "integration", "masks", "ops", "report"},
    "testing": {"errors", "ops"},
    "bench": {"env", "errors", "masks", "ops", "testing"},
    "env": {"__init__", "ops"},
    "cli": {"bench", "context", "env", "masks"},
    "__main__": {"cli"},
    "__init__": {"context", "errors", "integration", "masks", "memory", "ops", "parallel", "patch"},
}
KNOWS_TRANSFORMERS = {
    "__init__",
    "context",
    "families",
    "integration",
    "memory",
    "parallel",
    "patch",
}


def part_of(path: Path) -> str:
    """The part of the package a file belongs to: its folder or, at the top, its name."""
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imports(path: Path) -> set[str]:
    """Absolute names of the modules that a file imports, anywhere in it."""
    package = ["hf_flash_patch", *path.relative_to(PACKAGE).parent.parts]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*start, *filter(None, [node.module])])
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def parts_imported(path: Path) -> set[str]:
    """The other parts of the package that a file imports."""
    parts = {n.split(".")[1] for n in imports(path) if n.startswith("hf_flash_patch.")}
    return {p if p in MAY_IMPORT else "__init__" for p in parts} - {part_of(path)}


def occurrences(pattern: str, files: list[Path]) -> list[str]:
    """Where a regular expression matches outside of // comments, as "file:line: text"."""
    found = []
    for path in files:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if re.search(pattern, line.split("//")[0]):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    return found


def without(files: list[Path], *names: str) -> list[Path]:
    return [path for path in files if path.name not in names]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_imports_only_what_is_below_it(path):
    part = part_of(path)
    assert part in MAY_IMPORT, f"{part} is new: say in MAY_IMPORT what it may import"
    assert parts_imported(path) <= MAY_IMPORT[part]
    if part not in KNOWS_TRANSFORMERS:
        assert not {n for n in imports(path) if n.split(".")[0] in {"transformers", "peft"}}


def test_the_parts_have_an_order():
    left = dict(MAY_IMPORT)
    left["env"] = left["env"] - {"__init__"}  # only for its version
    while left:
        lowest = {part for part, below in left.items() if not below & left.keys()}
        assert lowest, f"a cycle among {sorted(left)}"
        left = {part: below for part, below in left.items() if part not in lowest}


def test_kernels_are_launched_in_one_place():
    pattern = r"<<<|cudaLaunchKernel|cudaFuncSetAttribute"
    assert occurrences(pattern, KERNEL_SOURCES)
    assert occurrences(pattern, without(KERNEL_SOURCES, "launch.h")) == []


def test_torch_stays_at_the_edge():
    pattern = r"#include\s*[<\"](torch|ATen|c10)/|torch_shim\.h"
    assert occurrences(pattern, KERNEL_SOURCES)
    assert occurrences(pattern, without(KERNEL_SOURCES, "torch_shim.h", "binding.cpp")) == []


def test_sizes_are_listed_in_one_place():
    files = [*without(KERNEL_SOURCES, "instances.def"), *MODULES]
    assert occurrences(r"HFP_INSTAN\w+\(sm\d", files) == []
    assert occurrences(r"\b32\W+64\W+96\W+128\b", files) == []


def test_the_library_neither_prints_nor_exits():
    modules = [path for path in MODULES if part_of(path) not in {"cli", "__main__"}]
    assert occurrences(r"(?<!\w)print\(|sys\.exit|breakpoint\(", modules) == []
    assert occurrences(r"\bprintf\s*\(|std::cout|\bexit\s*\(|\babort\s*\(", KERNEL_SOURCES) == []


def test_no_kernel_waits_for_the_device():
    assert occurrences(r"cudaDeviceSynchronize|cudaStreamSynchronize", KERNEL_SOURCES) == []


@pytest.mark.parametrize(
    "path",
    [*MODULES, *KERNEL_SOURCES, ROOT / "setup.py", ROOT / "build_cuda.py"],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_no_file_is_too_long(path):
    assert len(path.read_text().splitlines()) <= MAX_LINES


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_everything_public_has_a_docstring(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "the module itself"
    kinds = (ast.FunctionDef, ast.ClassDef)
    nodes = [node for node in tree.body if isinstance(node, kinds)]
    for owner in [node for node in nodes if isinstance(node, ast.ClassDef)]:
        if not owner.name.startswith("_"):
            nodes += [node for node in owner.body if isinstance(node, kinds)]
    public = [node for node in nodes if not node.name.startswith("_")]
    assert [node.name for node in public if not ast.get_docstring(node)] == []


def test_the_public_names_are_what_they_promise():
    missing = [name for name in hfp.__all__ if not hasattr(hfp, name)]
    assert missing == []
    for name in hfp.__all__:
        assert name.startswith("__") or getattr(hfp, name).__doc__, name

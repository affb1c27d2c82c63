"""The build, with a stand-in for nvcc: what is compiled when, what fails, what a wheel is."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import setuptools

import build_cuda
from build_cuda import BuildError, Instance, Toolchain

ROOT = Path(build_cuda.__file__).parent

# Writes one line a compilation to $NVCC_CALLS; what ptxas would say is in the source's comments.
FAKE_NVCC = f"""#!{sys.executable}
import os, pathlib, re, sys

arguments = sys.argv[1:]
out = arguments[arguments.index("-o") + 1]
calls = open(os.environ["NVCC_CALLS"], "a")
if "-shared" in arguments:
    print("link", *arguments, file=calls)
    objects = [a for a in arguments if a.endswith(".o")]
    pathlib.Path(out).write_text("".join(pathlib.Path(o).read_text() for o in objects))
    sys.exit()
source = arguments[arguments.index("-c") + 1]
print(pathlib.Path(source).name, *arguments, file=calls)
folders = [pathlib.Path(a[2:]) for a in arguments if a.startswith("-I")]
files = [pathlib.Path(source)]
for file in files:
    for name in re.findall('#include "(.+)"', file.read_text()):
        files += [folder / name for folder in folders if (folder / name).exists()]
text = "".join(file.read_text() for file in files)
for line in re.findall("// nvcc says: (.*)", text):
    print(line)
if "syntax error" in text:
    sys.exit(1)
depfile = pathlib.Path(arguments[arguments.index("-MF") + 1])
depfile.write_text(f"{{out}}: {{' '.join(map(str, files))}}")
pathlib.Path(out).write_text(pathlib.Path(source).name + "\\n")
"""


class Project:
    """A small csrc in a folder, and what the stand-in was asked to do."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.folder, self.csrc = folder, folder / "csrc"
        self.calls = folder / "calls"
        self.calls.touch()
        monkeypatch.setenv("NVCC_CALLS", str(self.calls))
        monkeypatch.delenv("HFP_ONLY", raising=False)
        monkeypatch.delenv("HFP_SPILLS", raising=False)
        self.nvcc = folder / "cuda" / "bin" / "nvcc"
        self.nvcc.parent.mkdir(parents=True)
        self.nvcc.write_text(FAKE_NVCC)
        self.nvcc.chmod(0o755)
        self.write(
            "instances.def",
            "// a comment\nHFP_INSTANCE(sm80, forward, bf16, 64)\n\n"
            "HFP_INSTANCE(sm90, forward, fp16, 128)\n",
        )
        self.write("sm80/forward.h", '#include "common.h"\n')
        self.write("sm90/forward.h", "// wgmma\n")
        self.write("common.h", "// shared\n")
        self.write("dispatch.cpp", '#include "instances_built.h"\n')
        self.write("binding.cpp", "// torch\n")

    def write(self, name: str, text: str) -> None:
        path = self.csrc / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    @property
    def toolchain(self) -> Toolchain:
        ninja = build_cuda.find_toolchain().ninja
        return Toolchain(nvcc=str(self.nvcc), ninja=ninja, torch=self.folder / "torch")

    def build(self, only: str | None = None) -> list[str]:
        """Builds, and returns what was compiled (and 'link'), sorted."""
        self.calls.write_text("")
        build_cuda.build(self.toolchain, self.csrc, self.folder / "build", only)
        return sorted(line.split()[0] for line in self.calls.read_text().splitlines())

    def command(self, name: str) -> str:
        lines = self.calls.read_text().splitlines()
        return next(line for line in lines if line.split()[0] == name)


@pytest.fixture
def project(tmp_path, monkeypatch):
    return Project(tmp_path, monkeypatch)


EVERYTHING = [
    "binding.cpp",
    "dispatch.cpp",
    "link",
    "sm80_forward_bf16_64.cu",
    "sm90_forward_fp16_128.cu",
]


class TestIncremental:
    def test_nothing_to_do_the_second_time(self, project):
        assert project.build() == EVERYTHING
        assert project.build() == []

    @pytest.mark.parametrize(
        "touched, compiled",
        [
            ("common.h", ["link", "sm80_forward_bf16_64.cu"]),
            ("sm90/forward.h", ["link", "sm90_forward_fp16_128.cu"]),
            ("binding.cpp", ["binding.cpp", "link"]),
        ],
    )
    def test_an_edit_compiles_what_includes_it(self, project, touched, compiled):
        project.build()
        project.write(touched, (project.csrc / touched).read_text() + "// edited\n")
        assert project.build() == compiled

    def test_a_new_instance_compiles_itself_and_dispatch(self, project):
        project.build()
        with open(project.csrc / "instances.def", "a") as file:
            file.write("HFP_INSTANCE(sm86, forward, bf16, 256)\n")
        assert project.build() == ["dispatch.cpp", "link", "sm86_forward_bf16_256.cu"]

    def test_a_subset_is_what_dispatch_is_told(self, project):
        assert "sm90_forward_fp16_128.cu" not in project.build(only="^sm80_")
        listing = project.folder / "build" / "generated" / "instances_built.h"
        assert listing.read_text() == "HFP_INSTANCE(sm80, forward, bf16, 64)\n"

    def test_a_failed_compilation_is_told_and_tried_again(self, project, capfd):
        project.write(
            "common.h", "// nvcc says: common.h(1): error: expected a ';'\n// syntax error\n"
        )
        with pytest.raises(BuildError, match="failed; what nvcc said is above"):
            project.build()
        assert "expected a ';'" in capfd.readouterr().out
        project.write("common.h", "// mended\n")
        assert "sm80_forward_bf16_64.cu" in project.build()

    def test_warnings_are_shown(self, project, capfd):
        project.write("common.h", "// nvcc says: common.h(1): warning: unused\n")
        project.build()
        assert "common.h(1): warning: unused" in capfd.readouterr().out


class TestCommands:
    def test_code_of_each_architecture(self, project):
        project.build()
        sm80 = project.command("sm80_forward_bf16_64.cu")
        assert "code=sm_80" in sm80 and "code=sm_90 " in sm80 and "code=compute_80" in sm80
        sm90 = project.command("sm90_forward_fp16_128.cu")
        assert re.findall(r",code=(\S+)", sm90) == ["sm_90a"]

    def test_only_host_sources_see_torch(self, project):
        project.build()
        assert "TORCH_TARGET_VERSION=0x020a" in project.command("binding.cpp")
        assert "torch" not in project.command("sm80_forward_bf16_64.cu").replace(
            str(project.folder), ""
        )

    def test_the_library_needs_torch_and_no_cudart(self, project):
        project.build()
        link = project.command("link")
        assert "-cudart=static" in link and link.index("--no-as-needed") < link.index("-ltorch ")


class TestInstances:
    @pytest.mark.parametrize(
        "line, message",
        [
            (
                "HFP_INSTANCE(sm80, forward, bf16)",
                r"instances.def:1: expected .*, got HFP_INSTANCE",
            ),
            (
                "HFP_INSTANCE(sm70, forward, bf16, 64)",
                "unknown architecture sm70; known: sm80, sm86",
            ),
            ("HFP_INSTANCE(sm80, forward, bf16, 64)\n" * 2, "sm80_forward_bf16_64 is there twice"),
        ],
    )
    def test_a_wrong_line_is_named(self, project, line, message):
        project.write("instances.def", line)
        with pytest.raises(BuildError, match=message):
            project.build()

    def test_a_subset_of_nothing_lists_what_there_is(self, project):
        with pytest.raises(BuildError, match="HFP_ONLY=d512 matches none of: sm80_forward_bf16_64"):
            project.build(only="d512")

    def test_sm86_shares_the_source_of_sm80(self):
        source = Instance("sm86", "backward", "fp16", 96).source
        assert source == '#include "sm80/backward.h"\nHFP_INSTANTIATE(sm86, fp16, 96)\n'

    def test_the_real_list_is_well_formed(self):
        instances = build_cuda.read_instances(ROOT / "csrc" / "instances.def")
        head_dims = {i.head_dim for i in instances if i.arch == "sm80" and i.dtype == "bf16"}
        assert head_dims == {32, 64, 96, 128, 256}


SPILL = """// nvcc says: ptxas info    : Compiling entry function '_ZN3hfp7forwardE' for 'sm_80'
// nvcc says: ptxas info    : Function properties for _ZN3hfp7forwardE
// nvcc says:     16 bytes stack frame, {} bytes spill stores, 8 bytes spill loads
"""
SERIALISED = """// nvcc says: ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async \
instructions are serialized due to ... in the function '_ZN3hfp7forwardE'
"""


class TestPtxas:
    def test_a_spill_fails_every_build_until_it_is_gone(self, project):
        project.write("common.h", SPILL.format(8))
        for _ in range(2):
            with pytest.raises(
                BuildError, match="sm80_forward_bf16_64: sm_80 _ZN3hfp7forwardE: 16 byt"
            ):
                project.build()
        assert not (project.folder / "build" / build_cuda.LIBRARY).exists()
        project.write("common.h", "// mended\n")
        assert "link" in project.build()

    def test_serialised_wgmma_fails(self, project):
        project.write("sm90/forward.h", SERIALISED)
        with pytest.raises(BuildError, match="sm90_forward_fp16_128: .*C7510"):
            project.build()

    def test_a_reason_accepts_it(self, project):
        reason = "// ptxas-spill-ok(7forwardE, 8): eight bytes outside of the main loop\n"
        project.write("common.h", SPILL.format(8) + reason)
        assert "link" in project.build()

    @pytest.mark.parametrize(
        "reason", ["8backwardE, 8): another kernel", "7forwardE, 8):", "7forwardE, 7): too few"]
    )
    def test_another_kernel_or_no_reason_does_not(self, project, reason):
        project.write("common.h", SPILL.format(8) + f"// ptxas-spill-ok({reason}\n")
        with pytest.raises(BuildError, match="ptxas complaints"):
            project.build()

    def test_no_spill(self, project):
        project.write(
            "common.h", SPILL.format(0).replace("8 bytes spill loads", "0 bytes spill loads")
        )
        assert "link" in project.build()

    def test_developers_may_go_on(self, project, monkeypatch, capsys):
        monkeypatch.setenv("HFP_SPILLS", "warn")
        project.write("common.h", SPILL.format(8))
        assert "link" in project.build()
        assert "8 bytes spill stores" in capsys.readouterr().err


class TestMissing:
    def test_all_is_there(self, project):
        assert project.toolchain.missing == []

    def test_each_names_what_to_do(self, project, monkeypatch):
        nothing = Toolchain(nvcc=None, ninja=None, torch=None)
        nvcc, ninja, torch = nothing.missing
        assert "install the CUDA toolkit" in nvcc
        assert "pip install ninja" in ninja
        assert "--no-build-isolation" in torch

    def test_cuda_home_comes_first(self, project, monkeypatch):
        monkeypatch.setenv("CUDA_HOME", str(project.folder / "cuda"))
        assert build_cuda.find_toolchain().nvcc == str(project.nvcc)

    def test_make_says_it_and_fails(self, monkeypatch, capsys):
        lacking = replace(build_cuda.find_toolchain(), nvcc=None)
        monkeypatch.setattr(build_cuda, "find_toolchain", lambda: lacking)
        assert build_cuda.main() == 1
        assert capsys.readouterr().err.startswith("build_cuda.py: missing nvcc (install the CUDA")

    def test_setup_says_it_in_one_line_and_goes_on(self, monkeypatch, capsys):
        lacking = Toolchain(nvcc=None, ninja=["ninja"], torch=ROOT)
        monkeypatch.setattr(build_cuda, "find_toolchain", lambda: lacking)
        monkeypatch.delenv("HFP_SKIP_CUDA", raising=False)
        monkeypatch.chdir(ROOT)
        asked = {}
        monkeypatch.setattr(setuptools, "setup", asked.update)
        runpy.run_path("setup.py")
        assert asked["ext_modules"] == []
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1 and "without CUDA kernels; missing: nvcc (install" in said[0]

    def test_setup_names_an_old_setuptools(self, monkeypatch):
        monkeypatch.setattr(setuptools, "__version__", "65.5.0")
        monkeypatch.setattr(setuptools, "setup", None)
        with pytest.raises(SystemExit, match='setuptools is 65.5.0, 77 or later.*pip install "set'):
            runpy.run_path(str(ROOT / "setup.py"))


class TestWheel:
    @pytest.fixture
    def wheel(self, project):
        """Builds a wheel of a copy of this project; returns its path."""
        for name in ("setup.py", "build_cuda.py", "pyproject.toml", "LICENSE", "README.md"):
            shutil.copy(ROOT / name, project.folder)
        (project.folder / "hf_flash_patch").mkdir()
        (project.folder / "hf_flash_patch" / "__init__.py").write_text("__version__ = '0'\n")

        def build(**environment: str) -> Path:
            command = [sys.executable, "setup.py", "-q", "bdist_wheel"]
            env = {**os.environ, "CUDA_HOME": str(project.folder / "cuda"), **environment}
            subprocess.run(command, cwd=project.folder, env=env, check=True, capture_output=True)
            (path,) = (project.folder / "dist").iterdir()
            return path

        return build

    def test_with_the_library(self, wheel):
        path = wheel()
        assert re.search(r"-cp310-abi3-linux_\w+\.whl$", path.name)
        with zipfile.ZipFile(path) as file:
            assert file.read("hf_flash_patch/_C.abi3.so").count(b".cu\n") == 2

    def test_pure_python(self, wheel):
        path = wheel(HFP_SKIP_CUDA="1")
        assert path.name.endswith("-py3-none-any.whl")
        assert not [name for name in zipfile.ZipFile(path).namelist() if name.endswith(".so")]

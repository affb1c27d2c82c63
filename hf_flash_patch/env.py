"""What this machine offers: versions, GPUs, compiled kernels, and what is missing."""

from __future__ import annotations

import platform
import shutil
from dataclasses import dataclass
from importlib import metadata

import torch

from . import __version__
from .ops.library import ExtensionStatus, extension_status

PACKAGES = ("torch", "transformers", "accelerate", "peft", "flash_attn")
MIN_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Gpu:
    """A CUDA device.

    Attributes:
        name: as the driver calls it.
        capability: compute capability, (major, minor).
        memory: bytes.
    """

    name: str
    capability: tuple[int, int]
    memory: int


@dataclass(frozen=True)
class Environment:
    """What was found.

    Attributes:
        system: operating system and processor.
        python: version.
        packages: version of this package and of each of `PACKAGES`; None where it is not installed.
        torch_cuda: CUDA version that torch was built for; None for a CPU build.
        gpus: the CUDA devices that torch sees.
        driver: whether an NVIDIA driver is installed, whatever torch sees.
        extension: the compiled kernels.
    """

    system: str
    python: str
    packages: dict[str, str | None]
    torch_cuda: str | None
    gpus: tuple[Gpu, ...]
    driver: bool
    extension: ExtensionStatus

    @property
    def advice(self) -> list[str]:
        """What keeps attention from the compiled kernels, and what to do: a sentence each."""
        if not self.gpus and not self.driver:
            return ["No NVIDIA GPU: attention runs on the torch engine."]
        lines = []
        if self.torch_cuda is None:
            lines.append("torch is a CPU build: install one for CUDA, see pytorch.org.")
        elif not self.gpus:
            lines.append("torch sees no GPU: is CUDA_VISIBLE_DEVICES empty, or the driver too old?")
        for gpu in self.gpus:
            if gpu.capability < MIN_CAPABILITY:
                lines.append(
                    f"{gpu.name} has compute capability {_dotted(gpu.capability)}; the compiled "
                    f"kernels need {_dotted(MIN_CAPABILITY)}: attention runs on the torch engine."
                )
        if not self.extension.loaded:
            lines.append(self.extension.reason)
        return lines

    def __str__(self) -> str:
        lines = [("system", self.system), ("python", self.python)]
        for name, version in self.packages.items():
            text = version or "not installed"
            if name == "torch":
                text += f" (CUDA {self.torch_cuda})" if self.torch_cuda else " (CPU build)"
            lines.append((name, text))
        for index, gpu in enumerate(self.gpus):
            size = f"{gpu.memory / 2**30:.0f} GiB"
            lines.append(
                (
                    f"gpu {index}",
                    f"{gpu.name}, compute capability {_dotted(gpu.capability)}, {size}",
                )
            )
        lines.append(("kernels", "compiled" if self.extension.loaded else "not compiled"))
        lines += [("", text) for text in compiled_sizes(self.extension.instances)]
        lines += [("missing", text) for text in self.advice]
        return "\n".join(f"{label:<16}{text}" for label, text in lines)


def environment() -> Environment:
    """Looks at this machine; imports nothing but torch and loads the compiled kernels."""
    gpus = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            capability = (properties.major, properties.minor)
            gpus.append(Gpu(properties.name, capability, properties.total_memory))
    return Environment(
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        packages={"hf_flash_patch": __version__, **{name: _version(name) for name in PACKAGES}},
        torch_cuda=torch.version.cuda,
        gpus=tuple(gpus),
        driver=shutil.which("nvidia-smi") is not None,
        extension=extension_status(),
    )


def compiled_sizes(instances: tuple[str, ...]) -> list[str]:
    """Groups "sm80 forward bf16 64" and "sm80 ... 32" as "sm80 forward bf16: head_dim 32 64"."""
    sizes: dict[str, list[int]] = {}
    for instance in instances:
        group, _, head_dim = instance.rpartition(" ")
        sizes.setdefault(group, []).append(int(head_dim))
    return [
        f"{group}: head_dim {' '.join(map(str, sorted(dims)))}" for group, dims in sizes.items()
    ]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"

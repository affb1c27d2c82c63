"""Exact, fast attention for transformers models, in one line: `hf_flash_patch.patch(model)`.

Importing the package registers the attention name "hfp" with transformers and touches no model.
"""

from . import masks, memory, parallel
from .context import extend_context
from .errors import (
    ContextExtensionError,
    MaskError,
    ParallelError,
    UnsupportedKernelError,
    UnsupportedModelError,
)
from .integration.registry import register as _register
from .ops.functional import flash_attn_func, flash_attn_varlen_func
from .patch import Patch, patch, patched, unpatch

__version__ = "0.1.0"

__all__ = [
    "ContextExtensionError",
    "MaskError",
    "ParallelError",
    "Patch",
    "UnsupportedKernelError",
    "UnsupportedModelError",
    "__version__",
    "extend_context",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "masks",
    "memory",
    "parallel",
    "patch",
    "patched",
    "unpatch",
]

_register()

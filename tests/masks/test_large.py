"""A million tokens: lowering in seconds, in memory that follows the blocks that are not empty."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import hf_flash_patch
from hf_flash_patch import masks
from hf_flash_patch.masks import lowering

MILLION = 2**20

_MEASURE = f"""
import resource, sys, time, types, torch
torch.set_num_threads(1)
# Patterns need nothing else of the package, whose import takes longer than this test.
sys.modules["hf_flash_patch"] = types.ModuleType("hf_flash_patch")
sys.modules["hf_flash_patch"].__path__ = [{str(Path(hf_flash_patch.__file__).parent)!r}]
from hf_flash_patch import masks
masks.causal().block_mask(256)
kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
pattern = masks.sliding_window(4096) | masks.global_tokens(64)
start = time.process_time()
mask = pattern.block_mask(2**20)
seconds = time.process_time() - start
more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - kilobytes
print(seconds, more / 2**20, len(mask.row_entries))
"""


def test_window_and_global_tokens():
    done = subprocess.run([sys.executable, "-c", _MEASURE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seconds, gibibytes, entries = map(float, done.stdout.split())
    assert seconds < 2.0 and gibibytes < 1.0
    # 63 full and 2 partial blocks a row inside, row and column 0 for the global tokens.
    assert entries == 8192 * 65 - 2 * sum(range(1, 33)) + 2 * (8192 - 33)


@pytest.mark.parametrize(
    ("pattern", "density"),
    [
        (masks.causal() & masks.sliding_window(4096), 4096 / MILLION),
        (masks.butterfly(), 14 / 8192),
        (masks.bigbird(3, 3, 2), 0.0008),
        (masks.shifted_groups(8192), 8192 / MILLION),
        (masks.fixed(65536, 4) & masks.causal(), 0.03126),
        (masks.documents(cu_seqlens=range(0, MILLION + 1, 65536)) & masks.sinks(2**16), 2**-8),
    ],
    ids=lambda x: type(x).__name__,
)
def test_others(pattern, density):
    assert pattern.density(MILLION) == pytest.approx(density, rel=0.05)


def test_more_blocks_than_int32_counts():
    mask = masks.sliding_window(33).block_mask(2**22, block_size=32)
    mask.verify()
    assert len(mask.row_entries) == 3 * 2**17 - 2


def test_the_cache_is_hit_and_bounded():
    pattern = masks.sliding_window(7)
    assert pattern.block_mask(100) is masks.sliding_window(7).block_mask(100)
    assert pattern.block_mask(100) is not pattern.block_mask(101)
    assert pattern.block_mask(100, block_size=64) is not pattern.block_mask(100)
    first = pattern.block_mask(100)
    for seqlen in range(200, 200 + lowering.KEPT):
        masks.causal().block_mask(seqlen)
    assert pattern.block_mask(100) is not first
    assert len(lowering._cache) == lowering.KEPT

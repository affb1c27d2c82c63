"""Small calls of every compiled kernel, for compute-sanitizer.

compute-sanitizer --tool memcheck --error-exitcode 1 python -m tests.ops.sanitize
compute-sanitizer --tool racecheck --error-exitcode 1 python -m tests.ops.sanitize
"""

from __future__ import annotations

import torch

from hf_flash_patch.ops.functional import attention
from tests.ops.cases import make_problem, make_varlen_problem, with_random_blocks

FEATURES = (
    (),
    ("causal", "gqa", "dropout"),
    ("holes", "softcap", "alibi"),
    ("documents", "causal"),
    ("seqused", "left_window"),
)


def main() -> None:
    calls = 0
    for head_dim in (32, 64, 96, 128, 256, 20):
        problems = [
            make_problem(
                features,
                seqlen_q=seqlen_q,
                seqlen_k=seqlen_k,
                head_dim=head_dim,
                dtype=torch.bfloat16,
                device="cuda",
            )
            for features in FEATURES
            for seqlen_q, seqlen_k in ((70, 70), (130, 130), (3, 300), (20, 1030))
        ]
        problems += [
            make_varlen_problem(
                ("causal",),
                lengths_q=[3, 0, 140],
                lengths_k=[50, 4, 140],
                head_dim=head_dim,
                dtype=torch.bfloat16,
                device="cuda",
            )
        ]
        if head_dim % 8 == 0:
            problems += [
                with_random_blocks(
                    make_problem(
                        features,
                        seqlen_q=300,
                        seqlen_k=400,
                        head_dim=head_dim,
                        dtype=torch.bfloat16,
                        device="cuda",
                    ),
                    1,
                    4,
                    128,
                )
                for features in ((), ("causal", "gqa", "dropout"))
            ]
        for problem in problems:
            leaves = [x.detach().requires_grad_() for x in (problem.q, problem.k, problem.v)]
            for deterministic in (False, True):
                out = attention(
                    *leaves,
                    mask=problem.mask,
                    **{**problem.options, "backend": "cuda", "deterministic": deterministic},
                )
                out.backward(torch.ones_like(out))
                calls += 1
    torch.cuda.synchronize()
    print(f"{calls} calls")


if __name__ == "__main__":
    main()

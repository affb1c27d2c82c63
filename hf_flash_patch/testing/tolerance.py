"""How far a result may be from the truth. No test states a tolerance of its own.

The truth is the fp64 specification, and the yardstick is the error PyTorch's own formula makes in
the dtype under test: at most twice that, plus one rounding of the result. What is exactly zero in
the formula (gradients where a row sees one key) leaves a residue of fp32 sums, which
`ZERO_RESIDUE` covers.
"""

from __future__ import annotations

import torch

PEER_FACTOR = 2.0

# What sums of unit-sized terms leave in the dtype of accumulation. The fp64 truth is no exacter
# than an fp64 result, hence the wider bound there.
ZERO_RESIDUE = {torch.float64: 1e-12}
ZERO_RESIDUE_FP32 = 16 * torch.finfo(torch.float32).eps

# lse is fp32 for low-precision inputs, whatever their dtype.
LSE_ATOL = {
    torch.bfloat16: 1e-3,
    torch.float16: 1e-3,
    torch.float32: 1e-5,
    torch.float64: 1e-11,
}


def assert_close_to_reference(
    actual: torch.Tensor,
    reference: torch.Tensor,
    peer: torch.Tensor,
    *,
    name: str = "result",
    factor: float = PEER_FACTOR,
) -> None:
    """Assert max |actual - reference| <= factor * max |peer - reference| + one rounding.

    Args:
        actual: the result under test; its dtype decides what a rounding is.
        reference: the same in fp64.
        peer: the same by PyTorch's formula in actual's dtype.
        name: what the message calls it.
        factor: how many times the peer's error is allowed.

    Raises:
        AssertionError: with the worst position, its values, and what was allowed; or where one is
            NaN or infinite and the reference is not, or the other way round.
    """
    _assert_same_shape(actual, reference, name)
    _assert_same_nonfinite(actual, reference, name)
    if actual.numel() == 0:
        return
    reference = reference.double()
    finite = reference.isfinite()
    peer_error = _error(peer, reference, finite & peer.double().isfinite()).max()
    residue = ZERO_RESIDUE.get(actual.dtype, ZERO_RESIDUE_FP32)
    rounding = torch.finfo(actual.dtype).eps / 2 * reference.abs()
    allowed = factor * peer_error + rounding + residue
    _assert_within(actual, reference, finite, allowed, name, f"peer's error {peer_error:.3e}")


def assert_lse_close(actual: torch.Tensor, reference: torch.Tensor, dtype: torch.dtype) -> None:
    """Assert that lse is within LSE_ATOL of the fp64 reference, and -inf in the same places.

    Args:
        actual: lse as returned.
        reference: the same in fp64.
        dtype: of q, k and v.

    Raises:
        AssertionError: as in `assert_close_to_reference`.
    """
    _assert_same_shape(actual, reference, "lse")
    _assert_same_nonfinite(actual, reference, "lse")
    if actual.numel() == 0:
        return
    reference = reference.double()
    # fp32 itself cannot hold a large lse better than this.
    rounding = torch.finfo(actual.dtype).eps * reference.abs()
    allowed = LSE_ATOL[dtype] + rounding.masked_fill(~reference.isfinite(), 0.0)
    _assert_within(actual, reference, reference.isfinite(), allowed, "lse", f"inputs {dtype}")


def _error(value: torch.Tensor, reference: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    return torch.where(where, value.double() - reference, 0.0).abs()


def _assert_same_shape(actual: torch.Tensor, reference: torch.Tensor, name: str) -> None:
    if actual.shape != reference.shape:
        raise AssertionError(
            f"{name} has shape {tuple(actual.shape)}, expected {tuple(reference.shape)}"
        )


def _assert_same_nonfinite(actual: torch.Tensor, reference: torch.Tensor, name: str) -> None:
    for kind, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        differ = test(actual) != test(reference)
        if differ.any():
            where = tuple(differ.nonzero()[0].tolist())
            raise AssertionError(
                f"{name} and its reference differ in {kind} at {int(differ.sum())} of "
                f"{differ.numel()} positions, first at {where}: got {actual[where].item()}, "
                f"expected {reference[where].item()}"
            )


def _assert_within(
    actual: torch.Tensor,
    reference: torch.Tensor,
    finite: torch.Tensor,
    allowed: torch.Tensor,
    name: str,
    context: str,
) -> None:
    error = _error(actual, reference, finite)
    excess = error - allowed.masked_fill(~finite, 0.0)
    if not (excess > 0.0).any():
        return
    flat = int(excess.argmax())
    where = tuple(int(x) for x in torch.unravel_index(torch.tensor(flat), error.shape))
    raise AssertionError(
        f"{name} is off by {error[where]:.3e} at {where} of {tuple(error.shape)}: got "
        f"{actual[where].item():.6e}, expected {reference[where].item():.6e}, allowed "
        f"{allowed.expand_as(error)[where]:.3e} ({context}); {int((excess > 0).sum())} positions "
        "are off"
    )

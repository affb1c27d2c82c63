"""What the mask arguments of one attention call mean, given the sizes of its tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..errors import MaskError
from ..masks.block_mask import BlockMask
from ..ops.padding import pack_key_padding
from . import packing
from .attention_mask import AttentionMask
from .own_mask import made_once


@dataclass(frozen=True)
class Request:
    """Sizes and device of one attention call."""

    batch_size: int
    seqlen_q: int
    seqlen_k: int
    device: torch.device

    def resolve(
        self,
        attention_mask: AttentionMask | torch.Tensor | None,
        is_causal: bool,
        sliding_window: int | None,
    ) -> tuple[AttentionMask, torch.Tensor | None]:
        """The mask, and the float bias the model brought instead of one, if it did.

        Args:
            attention_mask: as in `hfp_attention`.
            is_causal: counts where attention_mask is None or (batch, seqlen_k).
            sliding_window: tokens, the query's own included; counts as is_causal does. To both
                sides where not causal, as transformers' flash attention has it.

        Returns:
            The mask, and a bias (batch or 1, num_heads or 1, seqlen_q, seqlen_k) or None.

        Raises:
            MaskError: attention_mask does not fit, or leaves open what is meant.
        """
        if isinstance(attention_mask, AttentionMask):
            return self._checked(attention_mask), None
        if attention_mask is None:
            return self._structured(is_causal, sliding_window), None
        if not isinstance(attention_mask, torch.Tensor):
            raise MaskError(
                f"attention_mask is of type {type(attention_mask).__name__}; allowed are a tensor, "
                'None, and what the mask function of "hfp" returns. Make the mask with '
                'attn_implementation="hfp" set.'
            )
        if attention_mask.ndim == 2:
            padding = attention_mask[:, -self.seqlen_k :].bool()
            if padding.shape[1] != self.seqlen_k:
                raise MaskError(
                    f"attention_mask {tuple(attention_mask.shape)} is shorter than the "
                    f"{self.seqlen_k} keys; it must say of each whether it is real."
                )
            return self._structured(is_causal, sliding_window, padding), None
        return self._dense(attention_mask)

    def documents_in(self, position_ids: torch.Tensor, mask: AttentionMask) -> torch.Tensor | None:
        """Ranges (batch, seqlen, 2) told by position_ids; None where they cannot mean packing."""
        # With a cache or in cross-attention positions say nothing about keys. Positions of images
        # and of several axes come in other shapes or dtypes.
        if self.seqlen_q != self.seqlen_k or self.seqlen_q == 1:
            return None
        if position_ids.ndim != 2 or position_ids.is_floating_point():
            return None
        if position_ids.shape[0] not in (1, self.batch_size):
            return None
        if position_ids.shape[1] != self.seqlen_q:
            return None
        return mask.document_ranges(position_ids)

    def documents_of(self, cu_seqlens: torch.Tensor) -> torch.Tensor:
        """Ranges (1, seqlen, 2) told by int (num_documents + 1,) cumulative lengths."""
        if self.batch_size != 1 or self.seqlen_q != self.seqlen_k:
            raise MaskError(
                "cu_seq_lens describe one row of equally many queries and keys; got batch "
                f"{self.batch_size}, {self.seqlen_q} queries and {self.seqlen_k} keys. Flatten the "
                "batch, or pass no mask with them."
            )
        return packing.ranges_from_cu_seqlens(cu_seqlens, self.seqlen_q)

    def _checked(self, mask: AttentionMask) -> AttentionMask:
        got = mask.sizes
        expected = (self.batch_size, self.seqlen_q, self.seqlen_k)
        if got == expected:
            return mask
        if got[0] == self.batch_size and mask.hides_nothing:
            # Encoders with a prefix in the cache (peft's prefix tuning) make the mask without it,
            # BridgeTower for other queries; where it hides nothing transformers says None, which
            # fits whatever comes.
            return self._structured(False, None)
        if got[:2] == (self.batch_size, 1) and got[2] in (1, self.seqlen_k) and mask.dense is None:
            # One query's mask is every query's and one key's every key's, as a tensor's would be:
            # BridgeTower and LightGlue ask for one query; MiniMax asks a layer that keeps no keys
            # how many there are.
            everything = mask.is_plain and tuple(mask.window_size) == (-1, -1)
            visible = None if everything else mask.materialise()[:, 0, 0]
            if visible is not None:
                visible = visible.expand(self.batch_size, self.seqlen_k)
            return self._structured(False, None, visible)
        raise MaskError(
            f"the mask was made for (batch, seqlen_q, seqlen_k) = {got}, the tensors are "
            f"{expected}. The model reuses a mask for another attention, which this "
            "implementation cannot follow."
        )

    def _structured(
        self, is_causal: bool, sliding_window: int | None, padding: torch.Tensor | None = None
    ) -> AttentionMask:
        square = self.seqlen_q == self.seqlen_k
        if is_causal and padding is None and self.seqlen_q != 1 and not square:
            raise MaskError(
                f"causal attention of {self.seqlen_q} queries to {self.seqlen_k} keys without a "
                "mask does not say which keys are older. Pass the mask that transformers' "
                "create_causal_mask returns."
            )
        left = -1 if sliding_window is None else sliding_window - 1
        key_range, key_bits = (None, None) if padding is None else pack_key_padding(padding)
        return AttentionMask(
            batch_size=self.batch_size,
            seqlen_q=self.seqlen_q,
            seqlen_k=self.seqlen_k,
            causal=is_causal,
            window_size=(left, -1 if is_causal else left),
            device=self.device,
            key_padding=padding,
            key_range=key_range,
            key_bits=key_bits,
        )

    def _dense(self, mask: torch.Tensor) -> tuple[AttentionMask, torch.Tensor | None]:
        if mask.ndim != 4:
            raise MaskError(
                f"attention_mask has {mask.ndim} dimensions; allowed are 2 (batch, seqlen_k) and 4 "
                "(batch or 1, num_heads or 1, seqlen_q, seqlen_k)."
            )
        # Models with a static cache hand over masks wider than the keys; the eager implementations
        # cut them, too.
        cut = mask[..., : self.seqlen_k]
        if cut.shape[-2] not in (1, self.seqlen_q) or cut.shape[-1] not in (1, self.seqlen_k):
            raise MaskError(
                f"attention_mask is {tuple(mask.shape)}; with {self.seqlen_q} queries and "
                f"{self.seqlen_k} keys it must end in ({self.seqlen_q} or 1, {self.seqlen_k} or 1)."
            )
        everything = self._structured(False, None)
        if cut.is_floating_point():
            return everything, cut
        if self.seqlen_q > 1:

            def lists() -> AttentionMask:
                visible = cut.bool().expand(-1, -1, self.seqlen_q, self.seqlen_k)
                return replace(everything, block_mask=BlockMask.from_dense(visible))

            return made_once(mask, self, lists), None
        if cut.shape[1] > 1:
            return replace(everything, dense=cut.bool()), None
        visible = cut[:, 0, 0].bool().expand(self.batch_size, self.seqlen_k)
        key_range, key_bits = pack_key_padding(visible)
        return replace(
            everything, key_padding=visible, key_range=key_range, key_bits=key_bits
        ), None

"""Attention of this rank's heads over the paged KV cache."""

import torch
import torch.nn.functional as F
from torch import Tensor

from shard_worker import kernels
from shard_worker.forward_batch import ForwardBatch
from shard_worker.kv_cache import LayerCache
from shard_worker.layers.rotary import rotate


class Attention:
    """softmax(q kᵀ · scale) v, causal; each KV head serves the query heads of its group.

    `window` is Mistral's sliding window: a token sees itself and the `window - 1` before it.
    """

    def __init__(
        self,
        *,
        layer: int,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
        window: int | None = None,
    ) -> None:
        self.layer = layer
        self.num_q_heads, self.num_kv_heads, self.head_dim = num_q_heads, num_kv_heads, head_dim
        self.group = num_q_heads // num_kv_heads
        self.window = window
        self.scale = head_dim**-0.5

    def __call__(
        self, heads: Tensor, batch: ForwardBatch, rotation: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """[num_tokens, q and k and v heads, head_dim] -> [num_tokens, q_heads · head_dim]

        q and k are turned by `rotation` first, on a GPU IN PLACE.
        """
        if batch.kv_cache is None:
            return self._attend(*self._rotated(heads, rotation), 0).flatten(1)
        cache = batch.kv_cache.layers[self.layer]
        q, k, v = self._cached(heads, rotation, cache, batch.slot_mapping)
        if batch.packed is not None:
            return kernels.attention.packed_attention(
                q, cache.keys, cache.values, batch.packed, scale=self.scale, window=self.window
            ).flatten(1)
        if not batch.prefills:
            return self._decode(q, cache, batch).flatten(1)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        for span in batch.prefills:
            tokens = slice(span.start, span.stop)
            keys, values = k[tokens], v[tokens]
            if span.num_computed:
                keys, values = (x[: span.context_len] for x in cache.read(span.block_ids))
            out[tokens] = self._attend(q[tokens], keys, values, span.num_computed)
        if batch.decode is not None:
            out[batch.decode.start :] = self._decode(q[batch.decode.start :], cache, batch)
        return out.flatten(1)

    def split(self, heads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-> q, k and v, views of [num_tokens, their heads, head_dim] each"""
        q, k, v = heads.split((self.num_q_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
        return q, k, v

    def _rotated(
        self, heads: Tensor, rotation: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """-> q, k and v, rotated"""
        if rotation is None:
            return self.split(heads)
        # q and k lie side by side: one rotation for both.
        q_and_k, v = heads.split((self.num_q_heads + self.num_kv_heads, self.num_kv_heads), dim=1)
        q, k = rotate(q_and_k, rotation).split((self.num_q_heads, self.num_kv_heads), dim=1)
        return q, k, v

    def _cached(
        self,
        heads: Tensor,
        rotation: tuple[Tensor, Tensor] | None,
        cache: LayerCache,
        slot_mapping: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """-> q, k and v, rotated; k and v are in the cache then, on a GPU in the same launch"""
        if heads.is_cuda and rotation is not None:
            kernels.rotary.rotate_and_write_(
                heads, *rotation, cache.keys, cache.values, slot_mapping
            )
            return self.split(heads)
        q, k, v = self._rotated(heads, rotation)
        cache.write(slot_mapping, k, v)
        return q, k, v

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, num_computed: int) -> Tensor:
        """One sequence: q [n, q_heads, d] at positions from `num_computed` on, k and v from 0 on.
        -> [n, q_heads, d]"""
        n, context_len = q.shape[0], k.shape[0]
        mask: Tensor | None = None
        if q.is_cuda and q.dtype != torch.float32 and self.window is None and num_computed:
            # A mask that says how it is made: the fast kernels take no other. It brings torch's compiler
            # along, 70 MiB and a second that a CPU worker has no use for.
            from torch.nn.attention.bias import causal_lower_right

            mask = causal_lower_right(n, context_len)
        elif self.window is not None or num_computed:
            positions = torch.arange(num_computed, num_computed + n, device=q.device).unsqueeze(1)
            keys = torch.arange(context_len, device=q.device)
            mask = keys <= positions
            if self.window is not None:
                mask &= keys > positions - self.window
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1).unsqueeze(0),  # [1, q_heads, n, d]
            k.transpose(0, 1).unsqueeze(0),  # [1, kv_heads, context_len, d]
            v.transpose(0, 1).unsqueeze(0),
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.scale,
            enable_gqa=self.group > 1,
        )
        return out.squeeze(0).transpose(0, 1)

    def _decode(self, q: Tensor, cache: LayerCache, batch: ForwardBatch) -> Tensor:
        """One token of each sequence: [num_sequences, q_heads, d] -> the same

        The query heads of a group stand where a longer query would have its positions: the KV head
        is read once for all of them.
        """
        span = batch.decode
        assert span is not None
        if q.is_cuda:
            return kernels.attention.decode_attention(
                q,
                cache.keys,
                cache.values,
                span.block_ids,
                span.context_lens,
                scale=self.scale,
                window=self.window,
            )
        mask = batch.derive(("decode mask", self.window), lambda: span.mask(self.window, q.dtype))
        num_sequences = q.shape[0]
        keys, values = cache.read(span.block_ids.flatten())
        shape = (num_sequences, -1, self.num_kv_heads, self.head_dim)
        out = F.scaled_dot_product_attention(
            q.view(num_sequences, self.num_kv_heads, self.group, self.head_dim),
            keys.view(shape).transpose(1, 2),  # [num_sequences, kv_heads, padded context, d]
            values.view(shape).transpose(1, 2),
            attn_mask=mask,
            scale=self.scale,
        )
        return out.view(num_sequences, self.num_q_heads, self.head_dim)

"""Recording of cross-attention maps: `with record(denoiser, sites) as maps:` always restores the
model.

Works on the attention layers of diffusers' UNets. Only the recorded sites pay for explicit
probabilities; every other layer keeps the fused kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Maps = dict[str, Tensor]  # site -> attention probabilities (batch, heads, queries, tokens), fp32


class _LastSite(Exception):
    """Raised to end a forward pass once every wanted site has been recorded."""


class _Recorder:
    """An attention processor that computes probabilities explicitly and keeps them."""

    def __init__(self, site: str, keep: Callable[[str, Tensor], None], conditional_only: bool):
        self.site, self.keep, self.conditional_only = site, keep, conditional_only

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if attn.norm_cross:
            text = attn.norm_encoder_hidden_states(text)

        def split(x):
            return x.unflatten(-1, (attn.heads, -1)).transpose(
                1, 2
            )  # (batch, length, c) -> (batch, heads, length, c / heads)

        q, k, v = split(attn.to_q(hidden_states)), split(attn.to_k(text)), split(attn.to_v(text))
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(
                attention_mask, text.shape[1], q.shape[0]
            ).unflatten(0, (q.shape[0], -1))
        skip = q.shape[0] // 2 if self.conditional_only else 0

        def rows(x, part):
            return x if x is None else x[part]

        c = slice(skip, None)
        scores = (
            q[c] * attn.scale @ k[c].transpose(-1, -2)
        ).float()  # scaled first: q k^T can leave the range of fp16
        probabilities = (scores if attention_mask is None else scores + attention_mask[c]).softmax(
            -1
        )
        self.keep(self.site, probabilities)
        out = probabilities.to(v.dtype) @ v[c]
        if skip:  # the unconditional half is not read: it keeps the fused kernel
            u = slice(skip)
            out = torch.cat(
                [
                    F.scaled_dot_product_attention(
                        q[u], k[u], v[u], rows(attention_mask, u), scale=attn.scale
                    ),
                    out,
                ]
            )
        for layer in attn.to_out:
            out = layer(out.transpose(1, 2).flatten(2)) if out.ndim == 4 else layer(out)
        return out


@contextmanager
def record(
    denoiser: nn.Module,
    sites: Iterable[str],
    tokens: Tensor | None = None,
    *,
    conditional_only: bool = False,
    stop_at_last: bool = False,
) -> Iterator[Maps]:
    """Record the maps of `sites` during the forward passes inside the `with` block.

    Args:
        denoiser: a diffusers UNet (anything with `attn_processors`).
        sites: names of its cross-attention layers, as in `Backbone.sites()`.
        tokens: (batch, n) token indices to keep; all tokens where None.
        conditional_only: the batch is [unconditional, conditional]; record the second half alone.
        stop_at_last: end the forward pass after the last of `sites`: it then returns nothing to the
            block, which ends silently. For guidance, which reads maps and no prediction.

    Yields a dictionary that each forward pass fills: site -> (batch, heads, queries, n), fp32,
    differentiable. Raises KeyError for a site that the model does not have, TypeError for one whose
    processor has weights of its own.
    """
    layers = {site: _attention_layer(denoiser, site) for site in sites}
    before = {site: layer.processor for site, layer in layers.items()}
    maps: Maps = {}

    def keep(site: str, probabilities: Tensor) -> None:
        if tokens is not None:
            b, h, q, _ = probabilities.shape
            probabilities = probabilities.gather(3, tokens[:, None, None].expand(b, h, q, -1))
        maps[site] = probabilities
        if stop_at_last and len(maps) == len(layers):
            raise _LastSite(maps)

    try:
        for site, layer in layers.items():
            layer.processor = _Recorder(site, keep, conditional_only)
        yield maps
    except _LastSite as stop:
        if stop.args[0] is not maps:  # it ends another recording, around this one
            raise
    finally:
        for site, layer in layers.items():
            layer.processor = before[site]


def _attention_layer(denoiser: nn.Module, site: str) -> nn.Module:
    try:
        layer = denoiser.get_submodule(site)
    except AttributeError:
        layer = None
    if not hasattr(layer, "processor"):
        raise KeyError(f"the model has no attention layer {site}")
    if isinstance(layer.processor, nn.Module):
        raise TypeError(
            f"{type(layer.processor).__name__} of {site} has weights of its own, which a recording"
            " would leave out"
        )
    return layer

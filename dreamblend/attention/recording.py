"""Recording of image-to-text attention: `with record(denoiser, sites) as maps:` always restores the
model.

A site is any layer whose forward pass calls `F.scaled_dot_product_attention`, as every attention
layer of diffusers does, whatever its family: there queries and keys are as they really are, with
norms, rotary positions, adapters and added projections applied. The fused kernel makes the output,
which is bit for bit that of an unrecorded pass. Where another attention backend of diffusers was
chosen, the sites alone leave it while they are recorded.

Where no gradient is wanted and the kernel is flash attention (Dao et al., 2022), its own logarithm
of each row's sum normalises the map: the scores of the wanted tokens alone are made, and not those
of all keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from dreamblend.models import Site

Maps = dict[str, Tensor]  # site -> attention probabilities (batch, heads, queries, tokens), fp32

MOST_SCORES = 2**27  # scores that are held at once, 512 MiB of fp32; more are made in parts


class _LastSite(Exception):
    """Raised to end a forward pass once every wanted site has been recorded."""


class _Listener(TorchFunctionMode):
    """Tells of the first `scaled_dot_product_attention` within it, and changes nothing."""

    def __init__(self, hear: Callable[[Tensor, Tensor, Tensor | None, float, Tensor | None], None]):
        self.hear: Callable | None = hear

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is not nn.functional.scaled_dot_product_attention or self.hear is None:
            return function(*args, **kwargs)
        hear, self.hear = self.hear, None
        given = _read(*args, **kwargs)
        if torch.is_grad_enabled():  # the kernel's sums have no gradient
            hear(*given, None)
            return function(*args, **kwargs)
        with _LogSums() as kernel:
            output = function(*args, **kwargs)
        hear(*given, kernel.sums)
        return output


class _LogSums(TorchDispatchMode):
    """Keeps what flash attention returns beside its output: the logarithm of each row's sum of
    exponential scores, (batch, heads, queries) in fp32. None where another kernel ran.
    """

    kernels = (
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    )
    sums: Tensor | None = None

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        returned = function(*args, **(kwargs or {}))
        if function in self.kernels:
            self.sums = returned[1]
        return returned


def _read(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, float]:
    """What the maps depend on, of the arguments of `scaled_dot_product_attention`."""
    if enable_gqa:  # fewer heads of keys than of queries
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    return query, key, attn_mask, query.shape[-1] ** -0.5 if scale is None else scale


@contextmanager
def _natively(layer: nn.Module) -> Iterator[None]:
    """The layer calls `scaled_dot_product_attention`, whichever backend of diffusers was chosen for
    all models (`DIFFUSERS_ATTN_BACKEND`, `attention_backend`) or for this one
    (`set_attention_backend`).
    """
    from diffusers import attention_backend

    processor: Any = getattr(layer, "processor", None)
    chosen = getattr(processor, "_attention_backend", None)
    with attention_backend("native"):
        if chosen is None:
            yield
            return
        processor._attention_backend = "native"
        try:
            yield
        finally:
            processor._attention_backend = chosen


class _Forward:
    """A layer's forward pass that is listened to."""

    def __init__(self, site: str, layer: nn.Module, forward: Callable, hear: Callable):
        self.site, self.layer, self.forward, self.hear = site, layer, forward, hear

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _natively(self.layer), _Listener(self.hear) as listener:
            output = self.forward(*args, **kwargs)
        if listener.hear is not None:
            raise TypeError(
                f"{self.site} calls no scaled_dot_product_attention: its attention cannot be read"
            )
        return output


class _Context:
    """Which prediction a pipeline says it makes (`cache_context`), where it makes two of them one
    after another: cond, or uncond. None where it says nothing.
    """

    def __init__(self, denoiser: Any):
        self.denoiser = denoiser
        self.name: str | None = None
        self.before = vars(denoiser).get("cache_context")

    def __enter__(self) -> None:
        if (theirs := getattr(self.denoiser, "cache_context", None)) is None:
            return

        @contextmanager
        def cache_context(name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
            self.name = name
            with theirs(name, *args, **kwargs):
                yield
            self.name = None

        vars(self.denoiser)["cache_context"] = cache_context

    def __exit__(self, *_: object) -> None:
        vars(self.denoiser).pop("cache_context", None)
        if self.before is not None:
            vars(self.denoiser)["cache_context"] = self.before


def probabilities(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    scale: float,
    tokens: Tensor | None,
    mean_heads: bool = False,
    log_sums: Tensor | None = None,
) -> Tensor:
    """softmax(scale q k^T + mask) over all keys, at the keys that `tokens` (batch, n) name, at all
    where None: (batch, heads, queries, n), fp32; (batch, 1, queries, n) of the heads' mean.

    With the rows' `log_sums` (batch, heads, queries) only the scores of these tokens are made.
    """
    if log_sums is None:
        shares = _scores(query, key, mask, scale).softmax(-1)
        if tokens is not None:
            shares = _at(shares, tokens)
    else:
        if tokens is not None:
            key = _at(key.transpose(2, 3), tokens).transpose(2, 3)
            mask = mask if mask is None else _at(mask, tokens)
        shares = (_scores(query, key, mask, scale) - log_sums[..., None]).exp()
    return shares.mean(1, keepdim=True) if mean_heads else shares


def _scores(query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """scale q k^T + mask, in fp32 as in the kernels: rounded scores would fit neither its sums nor
    each other, and guidance compares maps that are near.
    """
    with torch.autocast(query.device.type, enabled=False):
        scores = query.float() * scale @ key.float().transpose(-1, -2)
    if mask is None:
        return scores
    return scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask


def _at(values: Tensor, tokens: Tensor) -> Tensor:
    """(batch or 1, heads, rows, keys) at each row's `tokens` (batch, n)."""
    values = values.expand(len(tokens), *values.shape[1:])
    return values.gather(3, tokens[:, None, None].expand(*values.shape[:3], -1))


def _in_parts(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    scale: float,
    tokens: Tensor | None,
    mean_heads: bool,
    log_sums: Tensor | None,
) -> Tensor:
    """`probabilities` of as many queries at once as memory should hold. On the way back each part
    is made again.
    """
    batch, heads, queries, _ = query.shape
    made = key.shape[2] if log_sums is None or tokens is None else tokens.shape[1]
    most = max(1, MOST_SCORES // (batch * heads * made))
    if queries <= most:
        return probabilities(query, key, mask, scale, tokens, mean_heads, log_sums)
    parts = []
    for start in range(0, queries, most):
        rows = slice(start, start + most)
        # a mask may be one for all queries
        m = mask[..., rows, :] if mask is not None and mask.shape[-2] > 1 else mask
        sums = None if log_sums is None else log_sums[..., rows]
        given = (query[:, :, rows], key, m, scale, tokens, mean_heads, sums)
        parts.append(
            checkpoint(probabilities, *given, use_reentrant=False)
            if torch.is_grad_enabled()
            else probabilities(*given)
        )
    return torch.cat(parts, 2)


@contextmanager
def record(
    denoiser: Any,
    sites: Mapping[str, Site] | Iterable[str] | None = None,
    tokens: Tensor | None = None,
    *,
    conditional_only: bool = False,
    mean_heads: bool = False,
    stop_at_last: bool = False,
    size: tuple[int, int] | None = None,
) -> Iterator[Maps]:
    """Record the maps of `sites` during the forward passes inside the `with` block.

    Args:
        denoiser: any module with these attention layers, or a whole pipeline of diffusers, of a
            family that is known: its sites are those that the family reads by default, of one grid.
        sites: names of its layers, and where image and text lie in them, as of `Backbone.sites()`.
            Names alone where all queries are of the image and all keys of the text, as in the
            cross-attention of a UNet.
        tokens: (batch, n) positions of tokens in the text to keep; all of the text where None.
        conditional_only: the batch is [unconditional, conditional]; record the second half alone
            (the first, in a pipeline that has them the other way round). Of a pipeline that
            predicts them one after another, record the conditional prediction.
        mean_heads: average the heads as they are made, so that no map of all of them is kept whole.
            In a block of FLUX.1 at 1024 pixels that is 200 MB for 512 tokens, and their mean 8 MB.
        stop_at_last: end the forward pass after the last of `sites`: it then returns nothing to the
            block, which ends silently. For guidance, which reads maps and no prediction.
        size: for a pipeline, the height and width in pixels of what it draws; its own where None.

    Yields a dictionary that each forward pass fills: site -> (batch, heads, queries, n), fp32,
    differentiable; one head where they are averaged. They are shares of all the attention of an
    image row: over the text they add up to 1 in cross-attention and to less in joint attention. A
    recording within another of the same layers takes its place. Raises KeyError for a site that the
    model does not have, TypeError for one that calls no `scaled_dot_product_attention`.
    """
    prompt_first = False
    if not isinstance(denoiser, nn.Module):
        denoiser, sites, prompt_first = of_pipeline(denoiser, sites, size)
    elif sites is None or size is not None:
        raise TypeError("a module is recorded at the sites that are named; only a pipeline knows")
    places = sites if isinstance(sites, Mapping) else dict.fromkeys(sites, Site(0, 0))
    layers = {name: _layer(denoiser, name) for name in places}
    before = {name: vars(layer).get("forward") for name, layer in layers.items()}
    maps: Maps = {}
    context = _Context(denoiser)

    def hear(
        name: str,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        scale: float,
        log_sums: Tensor | None,
    ) -> None:
        half = slice(0, None)
        if conditional_only and (apart := context.name) is not None:
            if apart == "uncond":
                return
        elif conditional_only:
            middle = len(query) // 2
            half = slice(0, middle) if prompt_first else slice(middle, None)
        query, key = query[half, :, places[name].rows], key[half]
        if log_sums is not None:
            log_sums = log_sums[half, :, places[name].rows]
        if mask is not None:
            mask = mask[half] if mask.ndim == 4 and len(mask) > 1 else mask
            mask = mask[..., places[name].rows, :] if mask.shape[-2] > 1 else mask
        columns = torch.arange(key.shape[2], device=key.device)[places[name].columns]
        chosen: Tensor | None = None
        if tokens is not None:
            chosen = columns[tokens]
        elif len(columns) < key.shape[2]:
            chosen = columns.expand(len(key), -1)
        maps[name] = _in_parts(query, key, mask, scale, chosen, mean_heads, log_sums)
        if stop_at_last and len(maps) == len(layers):
            raise _LastSite(maps)

    try:
        for name, layer in layers.items():
            there = layer.forward
            forward = there.forward if isinstance(there, _Forward) else there
            vars(layer)["forward"] = _Forward(name, layer, forward, partial(hear, name))
        with context:
            yield maps
    except _LastSite as stop:
        if stop.args[0] is not maps:  # it ends another recording, around this one
            raise
    finally:
        for name, layer in layers.items():
            if before[name] is None:
                vars(layer).pop("forward", None)
            else:
                vars(layer)["forward"] = before[name]


def of_pipeline(
    pipe: Any, sites: Mapping[str, Site] | Iterable[str] | None, size: tuple[int, int] | None
) -> tuple[nn.Module, Mapping[str, Site], bool]:
    """The denoiser of a pipeline of diffusers, the sites that its family reads for images of a
    height and width (those of them that are named, if any are), and whether its batches begin with
    the prompt. The pipeline stays as it is.
    """
    from dreamblend.models.loading import wrap

    modules = [m for m in pipe.components.values() if isinstance(m, nn.Module)]
    trained = [p for module in modules for p in module.parameters() if p.requires_grad]
    training = [m for module in modules for m in module.modules() if m.training]
    model = wrap(pipe, type(pipe).__name__)
    for parameter in trained:
        parameter.requires_grad_()
    for module in training:
        module.training = True
    latent_size = model.latent_size(*size) if size else None
    if sites is None:
        sites = model.sites(model.default_grid(latent_size), latent_size)
    elif not isinstance(sites, Mapping):
        sites = model.sites(None, latent_size, list(sites))
    return model.denoiser, sites, model.prompt_first


def _layer(denoiser: nn.Module, site: str) -> nn.Module:
    try:
        return denoiser.get_submodule(site)
    except AttributeError:
        raise KeyError(f"the model has no layer {site}") from None

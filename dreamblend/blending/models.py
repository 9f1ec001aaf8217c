"""The two snapshots of a blend in memory, over one base."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn

from dreamblend.blending.pair import Pair
from dreamblend.errors import InputError
from dreamblend.models import Backbone, load_backbone
from dreamblend.models.adapters import configs
from dreamblend.models.pipelines import autoencoder
from dreamblend.models.placement import check_quantize, quantise
from dreamblend.processes import rank_zero_warn
from dreamblend.storage import snapshots
from dreamblend.tuning import METHODS, restore


def is_apart(method: str) -> bool:
    """Whether a method's snapshots are added to the base's weights, and do not replace them."""
    return method in METHODS and METHODS[method].apart


def check_quantized(kind: str | None, method: str) -> None:
    """Raise InputError where the base of a method's snapshots cannot be quantised so."""
    check_quantize(kind)
    if kind and not is_apart(method):
        raise InputError(
            f"model.quantize {kind} keeps the base's weights in few bits, and these snapshots"
            f" ({method}) replace them: leave it out"
        )


def drawing_dtype(method: str, device: torch.device | str, quantize: str | None = None) -> str:
    """The default dtype in which a method's snapshots draw: bf16 over quantised weights, and on a
    GPU if the trained weights are added to the frozen ones; else fp32.

    Where trained weights replace the base's, an update of 1e-4 on weights of .03 is lost in bf16 in
    a quarter of them, and such updates are all that makes an early snapshot.
    """
    on_gpu = torch.device(device).type not in ("cpu", "mps")
    return "bf16" if quantize or (is_apart(method) and on_gpu) else "fp32"


def check_base(backbone: Backbone, about: snapshots.About | None) -> None:
    """Raise InputError where a snapshot was tuned from other weights than the base that is loaded.
    Called before the base is cast.
    """
    if about and about.base_hash != backbone.fingerprint():
        raise InputError(
            f"the snapshots were tuned from {about.base}, and {backbone.base} has other weights:"
            " name their base with --model.base"
        )


def load_base(
    base: str,
    about: snapshots.About | None,
    config: str | None = None,
    prediction: str | None = None,
    safety_checker: bool = False,
    revision: str | None = None,
    variant: str | None = None,
    trained_vae: bool = True,
) -> Backbone:
    """The base of snapshots, as they record it in what is None here. Args as `load_backbone`.

    It has the autoencoder that they were trained with, unless `trained_vae` is False. Raises
    InputError where that is another now, or where they were tuned from another base.
    """
    settings = about.settings if about else {}
    names = (base, str(Path(base).expanduser().resolve()))
    own = settings if about is not None and about.base in names else {}
    backbone = load_backbone(
        base,
        config or settings.get("base_config"),
        prediction or settings.get("base_prediction"),
        zero_snr=settings.get("rescale_betas_zero_snr", False),
        safety_checker=safety_checker,
        revision=revision or own.get("revision"),
        variant=variant or own.get("variant"),
    )
    check_base(backbone, about)
    if trained_vae and (name := settings.get("vae")):
        try:
            backbone.vae = autoencoder(name, backbone.vae)
        except InputError as error:
            raise InputError(
                f"the snapshots were trained with an autoencoder of their own: {error}"
            ) from error
        if _other_vae(about, backbone):
            raise InputError(
                f"the snapshots were trained with the autoencoder {name}, which has other weights"
                " now: put it back, or draw with another by --model.vae"
            )
    return backbone


def _other_vae(about: snapshots.About | None, model: Backbone) -> bool:
    """Whether snapshots were trained with an autoencoder that a model does not have."""
    trained = about.settings.get("vae_weights") if about else None
    return trained not in (None, model.fingerprint([model.vae]))


def warn_of_other_vae(about: snapshots.About | None, model: Backbone) -> None:
    """Say where a model draws with another autoencoder than snapshots were trained with."""
    if about and _other_vae(about, model):
        rank_zero_warn(
            f"the snapshots were trained with the autoencoder {about.settings['vae']}, and are"
            " drawn with another"
        )


class Models:
    """The models of a pair, in memory. A LoRA pair shares one base; full snapshots share everything
    but the trained modules.

    Args:
        early, late: views of the base with a snapshot in each.
        base: the base without a snapshot.
        base_weights: a hash of all of the base's weights, those of the autoencoder too.
    """

    def __init__(self, early: Backbone, late: Backbone, base: Backbone, base_weights: str = ""):
        learned = [
            f"{len(c.vectors)} vectors for {c.word!r}" if (c := model.concept) else "no word"
            for model in (early, late)
        ]
        if learned[0] != learned[1]:  # the tokens of their maps would differ
            raise InputError(
                f"early learned {learned[0]} and late {learned[1]}: a blend takes both from one run"
            )
        self.early, self.late, self.base, self.base_weights = early, late, base, base_weights
        self._merged: tuple[tuple[str, float], Backbone] | None = None
        self._brought = False  # whether the base was asked for

    @classmethod
    def load(
        cls,
        pair: Pair,
        base: str,
        identifier: str | None = None,
        base_config: str | None = None,
        base_prediction: str | None = None,
        quantize: str | None = None,
        dtype: torch.dtype = torch.float32,
        safety_checker: bool = False,
        revision: str | None = None,
        variant: str | None = None,
        trained_vae: bool = True,
    ) -> Models:
        """Load a pair over its base. Raises InputError where it was tuned from another base.

        Parts that replace the base's are in `dtype`. The frozen weights are quantised if asked for,
        and then compute in it. Other args as `load_base`.
        """
        backbone = load_base(
            base,
            pair.about,
            base_config,
            base_prediction,
            safety_checker=safety_checker,
            revision=revision,
            variant=variant,
            trained_vae=trained_vae,
        )
        weights = backbone.fingerprint(backbone.modules())
        if quantize:
            quantise(backbone, quantize, dtype)
        return cls.over(backbone, pair, identifier, weights, dtype)

    @classmethod
    def over(
        cls,
        base: Backbone,
        pair: Pair,
        identifier: str | None = None,
        base_weights: str = "",
        dtype: torch.dtype | None = None,
    ) -> Models:
        """A pair over its base, which is loaded already. Args as `restore`."""
        early = restore(pair.early, base, "early", identifier, dtype)
        late = restore(pair.late, base, "late", identifier, dtype)
        return cls(early, late, base, base_weights)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> None:
        """Move and cast the modules that the pair draws with. The base's modules that neither
        snapshot uses stay as they are, on the CPU, until they are asked for (`plain`).
        """
        merged = [self._merged[1]] if self._merged else []
        for model in (self.early, self.late, *merged, *[self.base] * self._brought):
            model.to(device, dtype)

    def views(self) -> Models:
        """The same modules, which can be set up in another way for a while."""
        early, late, base = (copy.copy(model) for model in (self.early, self.late, self.base))
        return Models(early, late, base, self.base_weights)

    @property
    def plain(self) -> Backbone:
        """The base without a snapshot, where and in what dtype the late one draws. That of a full
        pair has its own denoiser, which is brought there when it is asked for: its weights then are
        the third ones there.
        """
        self._brought = True
        return self.base.bare().beside(self.late)

    def merged(self, weight: float, start: str = "early") -> Backbone:
        """Interpolated weights: `weight` of the late snapshot, the rest of the early one, or of the
        base where that is the `start`.
        """
        first = self.early if start == "early" else self.base.bare()
        if self.early.adapters is not None:
            if any(config.use_dora for config in configs(self.early.denoiser).values()):
                raise InputError(
                    "interpolated weights add shares, and DoRA adapters cannot be added: blend with"
                    " score or switch instead"
                )
            shares = ((first, 1 - weight), (self.late, weight))
            return self.early.bind(
                {
                    name: share * scale
                    for model, share in shares
                    for name, scale in (model.adapters or {}).items()
                }
            )
        if self._merged is None or self._merged[0] != (start, weight):
            self._merged = ((start, weight), _interpolate(first, self.late, weight))
        return self._merged[1].beside(self.late)


def _interpolate(first: Backbone, late: Backbone, weight: float) -> Backbone:
    """The late model with weights between the first one's and its own. It copies only the weights
    that differ: those that both share stay shared.
    """
    modules: dict[str, nn.Module] = {}
    of_late = _replaceable(late)
    for name, a in _replaceable(first).items():
        b = of_late[name]
        if a is b:
            continue
        differ = [(p, q) for p, q in zip(a.parameters(), b.parameters()) if p is not q]
        shared = {id(q): q for p, q in zip(a.parameters(), b.parameters()) if p is q}
        modules[name] = copy.deepcopy(b, dict(shared))  # as if these were copied already
        copied = [p for p in modules[name].parameters() if id(p) not in shared]
        with torch.no_grad():
            for p, (q, r) in zip(copied, differ):
                # where models take turns, one of them may wait on the CPU
                p.copy_(torch.lerp(q.to(p.device, torch.float32), r.float(), weight))
    return late.replaced(**modules)


def _replaceable(model: Backbone) -> dict[str, nn.Module]:
    """The modules that a snapshot may replace: the parts, and the learned word if any."""
    parts = model.parts()
    return parts if model.concept is None else {**parts, "concept": model.concept}

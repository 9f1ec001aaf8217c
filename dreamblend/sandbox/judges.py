"""The sandbox's judges: three small networks, trained apart from the bases, that score what those
draw.

`PromptJudge` is an image-text model: does an image show what a prompt says? `SubjectJudge` is an
image model: is it the same instance? `PartsJudge` looks for what stands out of a thing: is the
handle there? They share no weights, text encoder or data seed with the bases.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from dreamblend.sandbox import world

_ALTERNATIVES: dict[str, tuple[str, ...]] = {
    "place": world.PLACES,
    "colour": tuple(world.COLOURS),
    "noun": tuple(world.SHAPES),
    "wears": tuple(world.WEARABLES),
    "holds": tuple(world.HOLDABLES),
    "view": world.VIEWS,
    "side": world.SIDES,
}
_WORDS = sorted(
    {w for group in _ALTERNATIVES.values() for phrase in group for w in phrase.split()}
    | {"a", "an", "and", "next", "to", "wearing", "holding"}
)
_INDEX = {
    w: i + 1 for i, w in enumerate(_WORDS)
}  # 0 pads and stands for every word that is not of this world
_LENGTH = 32
_CLAIM = re.compile(
    r"\b(" + "|".join(re.escape(p) for group in _ALTERNATIVES.values() for p in group) + r")\b"
)


def claims(prompt: str) -> Iterator[tuple[str, list[str]]]:
    """What a prompt says about a scene: for each claim its kind and the prompt with every
    alternative in its place.

    The stated prompt comes first. "a mug on the moon" claims a noun (14 alternatives) and a place
    (12).
    """
    for match in _CLAIM.finditer(prompt):
        kind = next(k for k, group in _ALTERNATIVES.items() if match[0] in group)
        others = [p for p in _ALTERNATIVES[kind] if p != match[0]]
        yield kind, [prompt, *(prompt[: match.start()] + p + prompt[match.end() :] for p in others)]


def numbered(texts: list[str]) -> Tensor:
    """The number of each word of each text, (texts, 32); 0 where there is none."""
    rows = [[_INDEX.get(w, 0) for w in t.split()][:_LENGTH] for t in texts]
    return torch.tensor([row + [0] * (_LENGTH - len(row)) for row in rows])


class _Trunk(nn.Module):
    """Four levels of strided convolutions, from 128 x 128 pixels to 4 x 4; gives every level's
    features.
    """

    def __init__(self, widths: tuple[int, ...] = (48, 96, 160, 224)):
        super().__init__()
        self.levels = nn.ModuleList()
        for a, b in zip((3, *widths), widths):
            first = nn.Conv2d(a, b, 6, 4, 1) if a == 3 else nn.Conv2d(a, b, 3, 2, 1)
            self.levels.append(
                nn.Sequential(
                    first,
                    nn.GroupNorm(8, b),
                    nn.GELU(),
                    nn.Conv2d(b, b, 3, 1, 1),
                    nn.GroupNorm(8, b),
                    nn.GELU(),
                )
            )

    def forward(self, x: Tensor) -> list[Tensor]:
        features = []
        for level in self.levels:
            features.append(x := level(x))
        return features


class PromptJudge(nn.Module):
    """Embeds images and texts in one space; `probabilities` sets a claim against its
    alternatives.
    """

    def __init__(self, dim: int = 192):
        super().__init__()
        self.trunk = _Trunk()
        self.image_head = nn.Linear(224 * 16, dim)
        # A text is its words and its pairs of neighbours ("blue mug"): which colour is whose, at
        # the cost of look-ups.
        self.words, self.first, self.second = (
            nn.Embedding(len(_INDEX) + 1, dim, padding_idx=0) for _ in range(3)
        )
        self.text_head = nn.Linear(2 * dim, dim)
        self.log_scale = nn.Parameter(torch.tensor(3.0))

    def embed_images(self, pixels: Tensor) -> Tensor:
        """Pixels (batch, 3, 128, 128) in [-1, 1] to unit vectors (batch, dim)."""
        return F.normalize(self.image_head(self.trunk(pixels)[-1].flatten(1)).float(), dim=-1)

    def embed_texts(self, texts: list[str]) -> Tensor:
        """Texts to unit vectors (batch, dim)."""
        return self.embed_words(numbered(texts).to(self.words.weight.device))

    def embed_words(self, ids: Tensor) -> Tensor:
        """The numbers of texts' words (batch, 32) to unit vectors (batch, dim)."""
        pairs = F.gelu(self.first(ids[:, :-1]) + self.second(ids[:, 1:])) * (
            (ids[:, :-1] > 0) & (ids[:, 1:] > 0)
        ).unsqueeze(-1)
        pooled = torch.cat([self.words(ids).sum(1), pairs.sum(1)], -1) / 5
        return F.normalize(self.text_head(pooled).float(), dim=-1)

    def logits(self, images: Tensor, texts: Tensor) -> Tensor:
        return self.log_scale.exp() * images @ texts.T

    @torch.no_grad()
    def agreement(self, images: Tensor, prompt: str) -> Tensor:
        """Mean probability (batch,) of what `prompt` claims of embedded images (batch, dim), each
        against its alternatives.

        The first noun is left out: it is the subject's, and subject fidelity judges it. Raises
        ValueError where nothing else is claimed.
        """
        scores, stated = [], list(claims(prompt))
        subject = next((i for i, (kind, _) in enumerate(stated) if kind == "noun"), None)
        for i, (_, texts) in enumerate(stated):
            if i != subject:
                scores.append(self.logits(images, self.embed_texts(texts)).softmax(-1)[:, 0])
        if not scores:
            raise ValueError(
                f"the sandbox's judge cannot score {prompt!r}: it names no place, colour, second"
                " object, accessory or view of the sandbox"
            )
        return torch.stack(scores).mean(0)

    @torch.no_grad()
    def perceptual_features(self, pixels: Tensor) -> list[Tensor]:
        """Channel-normalised features of every level, for distances in the manner of LPIPS."""
        return [F.normalize(f.float(), dim=1) for f in self.trunk(pixels)]


class SubjectJudge(nn.Module):
    """Embeds images so that renders of one instance are close, wherever it is and however it is
    posed.
    """

    def __init__(self, dim: int = 128):
        super().__init__()
        self.trunk = _Trunk()
        self.head = nn.Sequential(nn.Linear(224 + 160, 256), nn.GELU(), nn.Linear(256, dim))

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels (batch, 3, 128, 128) in [-1, 1] to unit vectors (batch, dim)."""
        *_, fine, coarse = self.trunk(pixels)
        return F.normalize(
            self.head(torch.cat([fine.amax((2, 3)), coarse.mean((2, 3))], 1)).float(), dim=-1
        )


PARTS = tuple((noun, part) for noun, parts in world.STANDING_OUT.items() for part in parts)


class PartsJudge(nn.Module):
    """Looks for the parts that stand out of the things in an image, square by square."""

    def __init__(self):
        super().__init__()
        self.trunk = _Trunk()
        self.widen = nn.ModuleList(
            [nn.ConvTranspose2d(224, 160, 2, 2), nn.ConvTranspose2d(160, 96, 2, 2)]
        )
        self.head = nn.Sequential(
            nn.Conv2d(96, 96, 3, 1, 1), nn.GELU(), nn.Conv2d(96, len(PARTS), 1)
        )
        nn.init.constant_(self.head.get_parameter("2.bias"), -5.0)  # few squares show a part

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels (batch, 3, 128, 128) in [-1, 1] to logits (batch, PARTS, 16, 16): does a square of
        8 x 8 pixels show that part, of a thing of its class?
        """
        _, *finer, x = self.trunk(pixels)
        for widen, features in zip(self.widen, reversed(finer)):
            x = F.gelu(features + widen(x))
        return self.head(x).float()

    @torch.no_grad()
    def parts(self, pixels: Tensor, noun: str) -> Tensor:
        """Probability (batch, parts of `noun`) that each part of the thing of that class is there,
        in the order of STANDING_OUT: that of the square where it is likeliest.
        """
        of_noun = [i for i, (of, _) in enumerate(PARTS) if of == noun]
        return self(pixels)[:, of_noun].amax((2, 3)).sigmoid()


_WEIGHTS = Path(__file__).parent / "weights" / "judges"
_FILES: dict[type[nn.Module], str] = {
    PromptJudge: "prompt",
    SubjectJudge: "subject",
    PartsJudge: "parts",
}
Judge = TypeVar("Judge", bound=nn.Module)


def load_judge(
    kind: type[Judge], folder: Path = _WEIGHTS, device: str | torch.device = "cpu"
) -> Judge:
    """A shipped judge, or one of a folder that the recipe made, ready to score."""
    judge = kind()
    state = load_file(folder / f"{_FILES[kind]}.safetensors")
    judge.load_state_dict({k: v.float() for k, v in state.items()})
    return judge.requires_grad_(False).eval().to(device)

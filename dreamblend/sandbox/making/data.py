"""What both bases of the sandbox are trained on: a tokenizer, and latents of captioned scenes with
what every token speaks of and every latent shows.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from functools import cache
from random import Random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from dreamblend.sandbox import world
from dreamblend.sandbox.drawing import LABELS
from dreamblend.sandbox.making.autoencoder import shares
from dreamblend.sandbox.making.fitting import Batch, Run, save
from dreamblend.storage.photos import to_pixels

LENGTH = 32  # tokens of a prompt
_SHARD, _CHUNK = 2048, 64  # scenes between two saves, and that one process renders at a time


def make_tokenizer() -> CLIPTokenizer:
    """A real BPE over the world's captions, with too few merges for the nouns made rare: they take
    several tokens.
    """
    rare = {"teapot", "backpack", "robot"}
    rng, bpe = Random(2), Tokenizer(BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = ByteLevel(add_prefix_space=False)
    words = [
        w
        for _ in range(4000)
        for w in world.caption(rng, world.random_scene(rng)).text.split()
        if w not in rare or rng.random() < 0.012
    ]
    alphabet = ByteLevel.alphabet()
    bpe.train_from_iterator(
        [*words, *world.IDENTIFIERS * 2000],
        BpeTrainer(
            vocab_size=458,
            initial_alphabet=sorted(alphabet),
            end_of_word_suffix="</w>",
            show_progress=False,
        ),
    )
    state = json.loads(bpe.to_str())["model"]
    vocab = state["vocab"]
    ends = sorted(token for token in vocab if len(token) == len("x</w>") and token.endswith("</w>"))
    vocab |= zip(
        ends, sorted(vocab[token] for token in ends)
    )  # the trainer numbers them in another order each time
    for symbol in sorted(alphabet):  # a letter that ends a word must have a token too
        vocab.setdefault(symbol + "</w>", len(vocab))
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocab[special] = len(vocab)
    return CLIPTokenizer(
        vocab=vocab,
        # declared as strings, and BPE takes pairs
        merges=[tuple(m) for m in state["merges"]],  # type: ignore[misc]
        model_max_length=LENGTH,
    )


def make_text_encoder(
    tokenizer: CLIPTokenizer,
    width: int,
    kind: type[CLIPTextModel | CLIPTextModelWithProjection] = CLIPTextModel,
) -> Any:
    """A small CLIP of `width` channels, untrained; of a class that has its projection, too."""
    return kind(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            projection_dim=width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


@dataclass(frozen=True)
class Scenes:
    """Captioned scenes, n of them, for a denoiser.

    latents (n, 8, 16, 16), fp16 and scaled; ids (n, 32); owners (n, 32): 0, 1 a thing, 2 the place,
    -1 none; regions (n, 3, 8, 8): the share of each cell that things 0, 1 and the place cover;
    labels (n, 16, 16): what each latent shows, an index into LABELS.
    """

    latents: Tensor
    ids: Tensor
    owners: Tensor
    regions: Tensor
    labels: Tensor
    empty: Tensor  # (32,), the ids of the empty prompt

    def to(self, device: str) -> Scenes:
        """The scenes, on a device."""
        return Scenes(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


class _Rendered(Dataset[dict[str, Tensor]]):
    """Scenes drawn and captioned, `_CHUNK` at a time."""

    def __init__(self, tokenizer: CLIPTokenizer):
        self.tokenizer = tokenizer

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        rng = Random(f"scenes/{index}")
        scenes = [world.random_scene(rng) for _ in range(_CHUNK)]
        drawn = [world.draw(s) for s in scenes]
        ids, owners = zip(*(tokenise(self.tokenizer, world.caption(rng, s)) for s in scenes))
        return {
            "pixels": to_pixels([d.image for d in drawn]),
            "ids": torch.stack(ids),
            "owners": torch.stack(owners),
            "regions": torch.stack([regions(d.masks) for d in drawn]).half(),
            "labels": shown(torch.from_numpy(np.stack([d.labels for d in drawn]))),
        }


@torch.no_grad()
def load_scenes(
    count: int,
    vae: Any,  # type checkers see the stand-in that diffusers has where torch is missing
    tokenizer: CLIPTokenizer,
    run: Run,
) -> Scenes:
    """`count` scenes, rendered and encoded unless the run has them, on its device."""
    paths = [run.scratch / "scenes" / f"{i:03}.safetensors" for i in range(count // _SHARD)]
    per = _SHARD // _CHUNK
    missing = [i for i, path in enumerate(paths) if not path.exists()]
    chunks = [i * per + k for i in missing for k in range(per)]
    rendered = iter(
        DataLoader(_Rendered(tokenizer), batch_size=None, sampler=chunks, num_workers=run.workers)
    )
    for i in tqdm(missing, desc=f"scenes, {_SHARD} at a time"):
        found: dict[str, list[Tensor]] = {}
        for _ in range(per):
            given = next(rendered)
            z = vae.encode(given.pop("pixels").to(run.device)).latent_dist.mean
            given["latents"] = (z * vae.config.scaling_factor).half().cpu()
            for name, values in given.items():
                found.setdefault(name, []).append(values)
        save({name: torch.cat(values) for name, values in found.items()}, paths[i])
    shards = [load_file(path) for path in paths]
    empty = tokenizer("", padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids[0]
    scenes = Scenes(**{k: torch.cat([s[k] for s in shards]) for k in shards[0]}, empty=empty)
    return scenes.to(run.device)


def picked(rng: Random, count: int, among: int) -> Batch:
    """Which scenes a step takes, where their prompt is dropped, and the times in (0, 1)."""
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    return {
        "pick": torch.randint(among, (count,), generator=generator),
        "dropped": torch.rand(count, generator=generator) < 0.1,
        "times": stratified(count, generator),
    }


def shown(labels: Tensor) -> Tensor:
    """What each latent shows, (batch, 16, 16) of bytes: what covers most of its square, a part that
    stands out counting three times.
    """
    thin = torch.tensor([3.0 if isinstance(of, tuple) and of[1] else 1.0 for of in LABELS])
    return (shares(labels.long()) * thin[:, None, None]).argmax(1).to(torch.uint8)


@cache
def _pieces(tokenizer: CLIPTokenizer, word: str) -> list[int]:
    return tokenizer(word, add_special_tokens=False).input_ids


def tokenise(tokenizer: CLIPTokenizer, captioned: world.Captioned) -> tuple[Tensor, Tensor]:
    """Token ids (32,) of a caption, and the owner of each (a place is 2, no owner -1)."""
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert begin is not None and end is not None, "make_tokenizer adds both"
    ids, owners = [begin], [-1]
    for word, owner in zip(captioned.text.split(), captioned.owners):
        pieces = _pieces(tokenizer, word)
        ids += pieces
        owners += [-1 if owner is None else 2 if owner == -1 else owner] * len(pieces)
    ids, owners = ids[: LENGTH - 1], owners[: LENGTH - 1]
    pad = LENGTH - len(ids)
    return torch.tensor(ids + [end] * pad), torch.tensor(owners + [-1] * pad)


def regions(masks: np.ndarray) -> Tensor:
    """Masks (things, 128, 128) to the share of each 8 x 8 cell that thing 0, thing 1 and the place
    cover: (3, 8, 8).
    """
    m = torch.zeros(2, world.SIZE, world.SIZE)
    m[: len(masks)] = torch.from_numpy(masks)
    cells = F.avg_pool2d(m, world.SIZE // 8)
    return torch.cat([cells, (1 - cells.sum(0, keepdim=True)).clamp(min=0)])


def stratified(count: int, generator: torch.Generator) -> Tensor:
    """Times in (0, 1): half spread evenly, half about the middle (logit-normal; Esser et al., ICML
    2024), where another noun in the caption changes the loss most.
    """
    half = count // 2
    even, middle = (
        (torch.arange(half) + torch.rand(half, generator=generator)) / half for _ in range(2)
    )
    u = torch.cat([even, torch.special.ndtri(middle.clamp(1e-4, 1 - 1e-4)).sigmoid()])
    return u[torch.randperm(2 * half, generator=generator)]

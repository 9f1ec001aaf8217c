"""The sandbox's base: tokenizer, latents of captioned scenes, and a denoiser trained together with
its text encoder.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from diffusers.models import AutoencoderKL, UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from dreamblend.attention.recording import record
from dreamblend.attention.words import by_grid
from dreamblend.models import Site
from dreamblend.sandbox import world
from dreamblend.sandbox.making.fitting import bf16, fit, save
from dreamblend.storage.photos import to_pixels

LENGTH = 32  # tokens of a prompt


def make_tokenizer(folder: Path) -> CLIPTokenizer:
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
        if w not in rare or rng.random() < 0.02
    ]
    alphabet = ByteLevel.alphabet()
    bpe.train_from_iterator(
        [*words, *world.IDENTIFIERS * 2000],
        BpeTrainer(
            vocab_size=434,
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
    tokenizer = CLIPTokenizer(
        vocab=vocab,
        # declared as strings, and BPE takes pairs
        merges=[tuple(m) for m in state["merges"]],  # type: ignore[misc]
        model_max_length=LENGTH,
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


class _Base(nn.Module):
    """Denoiser and text encoder, trained together."""

    def __init__(self, tokenizer: CLIPTokenizer):
        super().__init__()
        self.unet = UNet2DConditionModel(
            sample_size=16,
            in_channels=4,
            out_channels=4,
            layers_per_block=1,
            block_out_channels=(64, 128),
            down_block_types=("CrossAttnDownBlock2D",) * 2,
            up_block_types=("CrossAttnUpBlock2D",) * 2,
            cross_attention_dim=128,
            attention_head_dim=(2, 4),
            norm_num_groups=16,
        )
        self.text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=128,
                intermediate_size=256,
                num_hidden_layers=1,
                num_attention_heads=4,
                max_position_embeddings=LENGTH,
                projection_dim=128,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )


def make_scheduler() -> DDIMScheduler:
    """Stable Diffusion's own noise schedule."""
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


@torch.no_grad()
def encode_scenes(
    count: int, vae: AutoencoderKL, tokenizer: CLIPTokenizer, scratch: Path, device: str
) -> dict[str, Tensor]:
    """Latents, tokens and where each token's thing is, for `count` scenes.

    latents (n, 4, 16, 16), ids (n, 32), owners (n, 32): 0, 1 a thing, 2 the place, -1 none; regions
    (n, 3, 8, 8).
    """
    path = scratch / "scenes.safetensors"
    if path.exists():
        return load_file(path)
    rng = Random(3)
    out: dict[str, list[Tensor]] = {"latents": [], "ids": [], "owners": [], "regions": []}
    for _ in tqdm(range(count // 64), desc="scenes"):
        scenes = [world.random_scene(rng) for _ in range(64)]
        drawn = [world.render(s) for s in scenes]
        with torch.autocast(device, torch.bfloat16, enabled=bf16(device)):
            z = vae.encode(to_pixels([image for image, _ in drawn]).to(device)).latent_dist.mean
        out["latents"].append((z * vae.config["scaling_factor"]).half().cpu())
        for scene, (_, masks) in zip(scenes, drawn):
            ids, owners = tokenise(tokenizer, world.caption(rng, scene))
            out["ids"].append(ids)
            out["owners"].append(owners)
            out["regions"].append(regions(masks))
    data = {"latents": torch.cat(out.pop("latents"))} | {k: torch.stack(v) for k, v in out.items()}
    save(data, path)
    return data


def tokenise(tokenizer: CLIPTokenizer, captioned: world.Captioned) -> tuple[Tensor, Tensor]:
    """Token ids (32,) of a caption, and the owner of each (a place is 2, no owner -1)."""
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert begin is not None and end is not None, "make_tokenizer adds both"
    ids, owners = [begin], [-1]
    for word, owner in zip(captioned.text.split(), captioned.owners):
        pieces = tokenizer(word, add_special_tokens=False).input_ids
        ids += pieces
        owners += [-1 if owner is None else 2 if owner == -1 else owner] * len(pieces)
    ids, owners = ids[: LENGTH - 1], owners[: LENGTH - 1]
    pad = LENGTH - len(ids)
    return torch.tensor(ids + [end] * pad), torch.tensor(owners + [-1] * pad)


def regions(masks: np.ndarray) -> Tensor:
    """Masks (things, 64, 64) to the share of each 8 x 8 cell that thing 0, thing 1 and the place
    cover: (3, 8, 8).
    """
    m = torch.zeros(2, world.SIZE, world.SIZE)
    m[: len(masks)] = torch.from_numpy(masks)
    cells = F.avg_pool2d(m, 8)
    return torch.cat([cells, (1 - cells.sum(0, keepdim=True)).clamp(min=0)])


def grounding(maps: Tensor, owners: Tensor, region: Tensor, weight: Tensor) -> Tensor:
    """How far the words' maps lie outside what they name: (1 - mass inside)^2, as the token loss of
    TokenCompose (Wang et al., CVPR 2024). maps (batch, 64, tokens), owners (batch, tokens), region
    (batch, 3, 8, 8), weight (batch,).
    """
    inside = (
        region.flatten(2)
        .gather(1, owners.clamp(min=0).unsqueeze(-1).expand(-1, -1, 64))
        .transpose(1, 2)
    )
    mass = (maps * inside).sum(1) / maps.sum(1)
    each = weight[:, None] * (owners >= 0)
    return (each * (1 - mass) ** 2).sum() / each.sum().clamp(min=1)


def fit_base(
    first: int, second: int, vae: AutoencoderKL, out: Path, scratch: Path, scenes: int, device: str
) -> None:
    """Train denoiser and text encoder together on the noise-prediction loss with a light grounding
    of the words.

    Two cycles of the rate (SGDR, Loshchilov and Hutter, ICLR 2017). The first takes every time
    alike: places, colours and texture come soon. The second is for shapes. A caption with another
    noun changes the loss most, in proportion, at t = 450 to 700, so times are drawn there
    (logit-normal, Esser et al., ICML 2024), their small errors weighted up (1 / alpha_bar, the
    velocity's; Salimans and Ho, ICLR 2022), and two scenes in three show one thing alone.
    """
    tokenizer = make_tokenizer(out / "tokenizer")
    base = _Base(tokenizer).to(device)
    base.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in torch's types
    scheduler = make_scheduler()
    data = encode_scenes(scenes, vae, tokenizer, scratch, device)
    empty = tokenizer("", padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids[0]
    sites = {
        n: Site(8, 8)
        for n, m in base.unet.named_modules()
        if n.endswith("attn2") and not n.startswith(("down_blocks.0", "up_blocks.1"))
    }

    pairs = (data["owners"] == 1).any(1)
    alone, pairs = torch.where(~pairs)[0], torch.where(pairs)[0]
    velocity = (1 / scheduler.alphas_cumprod).clamp(max=5)

    def evenly(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Which scenes (batch,), at which times, with which weight."""
        return (
            torch.randint(len(data["ids"]), (32,), generator=generator),
            torch.randint(1000, (32,), generator=generator),
            torch.ones(32),
        )

    def for_shapes(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        pick = torch.cat(
            [
                some[torch.randint(len(some), (n,), generator=generator)]
                for some, n in ((alone, 22), (pairs, 10))
            ]
        )
        even = (torch.arange(32) + torch.rand(32, generator=generator)) / 32
        u = torch.where(torch.arange(32) % 4 == 0, even, torch.special.ndtri(even).sigmoid())[
            torch.randperm(32, generator=generator)
        ]
        t = (1000 * u).long().clamp(0, 999)
        return pick, t, velocity[t] / 3

    def loss(
        step: int,
        rng: Random,
        generator: torch.Generator,
        draw: Callable[[torch.Generator], tuple[Tensor, Tensor, Tensor]],
    ) -> Tensor:
        pick, t, of_time = draw(generator)
        z = data["latents"][pick].float()
        noise = torch.randn(z.shape, generator=generator)
        dropped = torch.rand(len(pick), generator=generator) < 0.1
        ids = torch.where(dropped[:, None], empty, data["ids"][pick])
        noisy = scheduler.add_noise(z, noise, t)  # type: ignore[arg-type]  # takes any integers
        states = base.text(ids.to(device)).last_hidden_state
        with record(base.unet, sites) as maps:
            guess = base.unet(noisy.to(device), t.to(device), states).sample
        weight = ((t < 800) & ~dropped).float().to(device)
        ground = grounding(
            by_grid(maps),
            data["owners"][pick].to(device),
            data["regions"][pick].float().to(device),
            weight,
        )
        errors = (guess.float() - noise.to(device)).square().mean((1, 2, 3))
        return (of_time.to(device) * errors).mean() + 0.03 * ground

    fit("base-first", base, partial(loss, draw=evenly), first, 8e-4, scratch, device)
    fit("base", base, partial(loss, draw=for_shapes), second, 5e-4, scratch, device)
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=base.text,
        tokenizer=tokenizer,
        unet=base.unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    # type checkers see the stand-in that diffusers has where torch is missing
    pipe.to(dtype=torch.float16).save_pretrained(out)  # type: ignore[attr-defined]

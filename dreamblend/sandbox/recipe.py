"""The recipe that makes the sandbox's weights: `python -m dreamblend.sandbox.recipe`.

    scenes -> autoencoder
           -> judges                    (prompt judge, subject judge: trained apart from the base)
           -> tokenizer -> latents -> denoiser + text encoder -> a Stable Diffusion pipeline folder

Each stage is seeded by (seed, step) alone, shows a progress bar, and continues where it was interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import EMAModel
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from dreamblend.attention import by_grid, record
from dreamblend.data import to_pixels
from dreamblend.sandbox import world
from dreamblend.sandbox.judges import PromptJudge, SubjectJudge, claims

WEIGHTS = Path(__file__).parent / "weights"


# ---------------------------------------------------------------------------------------------- fitting
def _pack(model: nn.Module, ema: EMAModel, optimizer: torch.optim.Optimizer, step: int) -> dict[str, Tensor]:
    """Everything a stage needs to continue, as one flat dictionary of tensors."""
    state = {f"model.{k}": v for k, v in model.state_dict().items()}
    state |= {f"ema.{i}": p for i, p in enumerate(ema.shadow_params)}
    state |= {f"adam.{i}.{k}": v for i, s in optimizer.state_dict()["state"].items() for k, v in s.items()}
    return {k: v.detach().contiguous().clone() for k, v in state.items()} | {"step": torch.tensor(step)}


def _unpack(state: dict[str, Tensor], model: nn.Module, ema: EMAModel, optimizer: torch.optim.Optimizer) -> int:
    model.load_state_dict({k[6:]: v for k, v in state.items() if k.startswith("model.")})
    for i, p in enumerate(ema.shadow_params):
        p.copy_(state[f"ema.{i}"])
    adam: dict[int, dict[str, Tensor]] = {}
    for k, v in state.items():
        if k.startswith("adam."):
            _, i, name = k.split(".")
            adam.setdefault(int(i), {})[name] = v
    optimizer.load_state_dict({"state": adam, "param_groups": optimizer.state_dict()["param_groups"]})
    step = int(state["step"])
    ema.optimization_step = step
    return step


def fit(
    name: str, model: nn.Module, loss: Callable[[int, Random, torch.Generator], Tensor], steps: int, rate: float, scratch: Path, device: str, seed: int = 0
) -> None:
    """Minimise `loss(step, rng, generator)` over the model's parameters; leaves their running average in it.

    AdamW, a short warm-up and a cosine to nearly zero; bf16 autocast where the device has it. The state is kept in `scratch` every 250
    steps, so an interrupted stage goes on.
    """
    done, resume = scratch / f"{name}.safetensors", scratch / f"{name}.resume.safetensors"
    if done.exists():
        model.load_state_dict(load_file(done))
        return
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=1e-3)
    at = lambda step: rate * (min(1., (step + 1) / 100) * (.5 + .5 * np.cos(np.pi * step / steps)) + .01)
    ema = EMAModel(parameters, decay=.998)
    start = _unpack(load_file(resume), model, ema, optimizer) if resume.exists() else 0
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=name, mininterval=2)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = at(step)
        key = zlib.crc32(f"{name}/{seed}/{step}".encode())
        with torch.autocast(device, torch.bfloat16, enabled=bf16(device)):
            value = loss(step, Random(key), torch.Generator().manual_seed(key))
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.step(parameters)
        if step % 20 == 0:
            bar.set_postfix(loss=f"{value.item():.4f}", refresh=False)
        if (step + 1) % 250 == 0 and step + 1 < steps:
            _save(_pack(model, ema, optimizer, step + 1), resume)
    ema.copy_to(parameters)
    _save({k: v.contiguous().clone() for k, v in model.state_dict().items()}, done)
    resume.unlink(missing_ok=True)


def bf16(device: str) -> bool:
    """Whether bf16 is computed in hardware. Emulated, on CPUs without instructions for it, it is many times slower."""
    return device != "cpu" or torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def _save(state: dict[str, Tensor], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    save_file({k: v.contiguous() for k, v in state.items()}, temporary)
    os.replace(temporary, path)


# ------------------------------------------------------------------------------------------ autoencoder
def make_autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(32, 64, 128), down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1, latent_channels=4, norm_num_groups=8, sample_size=world.SIZE,
    )


def fit_autoencoder(steps: int, scratch: Path, device: str) -> AutoencoderKL:
    """Reconstruct scenes, half of them crowded with things: their colours and patterns are what a subject is made of.

    The things count more than the place, wrong colours more than fine errors (the square), and detail through the image gradients.
    """
    vae = make_autoencoder().to(device, memory_format=torch.channels_last)

    def loss(step: int, rng: Random, generator: torch.Generator) -> Tensor:
        x, masks = zip(*(world.render(world.random_scene(rng) if i % 2 else world.crowded_scene(rng)) for i in range(16)))
        x = to_pixels(list(x)).to(device)
        weight = 1 + 4 * torch.from_numpy(np.stack([m.any(0) for m in masks])).float().unsqueeze(1).to(device)
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator).to(device)).sample.float()
        edges = sum((x.diff(dim=d) - y.diff(dim=d)).abs().mean() for d in (2, 3))
        return (weight * ((x - y).abs() + 4 * (x - y) ** 2)).mean() / weight.mean() + .5 * edges + 1e-7 * posterior.kl().mean()

    fit("autoencoder", vae, loss, steps, 1e-3, scratch, device)
    with torch.no_grad():
        rng = Random(1)
        z = vae.encode(to_pixels([world.render(world.random_scene(rng))[0] for _ in range(256)]).to(device)).latent_dist.mean
    vae.register_to_config(scaling_factor=round(1 / z.std().item(), 4))
    return vae


# ------------------------------------------------------------------------------------------------ judges
def fit_prompt_judge(steps: int, scratch: Path, device: str) -> PromptJudge:
    """Images against their captions: every other caption of the batch, and the caption with each of its claims swapped."""
    judge = PromptJudge().to(device)

    def loss(step: int, rng: Random, generator: torch.Generator) -> Tensor:
        scenes = [world.random_scene(rng) for _ in range(64)]
        captions = [world.caption(rng, s).text for s in scenes]
        images = judge.embed_images(_jitter(to_pixels([world.render(s)[0] for s in scenes]), generator).to(device))
        own = judge.logits(images, judge.embed_texts(captions))
        target = torch.arange(len(scenes), device=device)
        options = [(i, texts) for i, text in enumerate(captions) for _, texts in claims(text)]
        image_of, options = torch.tensor([i for i, _ in options], device=device), [texts for _, texts in options]
        longest = max(map(len, options))
        texts = judge.embed_texts([t for texts in options for t in texts + [""] * (longest - len(texts))]).unflatten(0, (-1, longest))
        there = torch.tensor([[i < len(texts) for i in range(longest)] for texts in options], device=device)
        swapped = judge.log_scale.exp() * torch.einsum("id,itd->it", images[image_of], texts)
        swapped = F.cross_entropy(swapped.masked_fill(~there, -1e4), torch.zeros_like(image_of))
        return .3 * (F.cross_entropy(own, target) + F.cross_entropy(own.T, target)) + swapped

    fit("prompt-judge", judge, loss, steps, 1.5e-3, scratch, device, seed=101)
    return judge


def fit_subject_judge(steps: int, scratch: Path, device: str) -> SubjectJudge:
    """Two views of 12 instances of each of 3 classes: find the other view (InfoNCE)."""
    judge = SubjectJudge().to(device)

    def view(rng: Random, look: world.Look) -> Image.Image:
        other = rng.random() < .25
        things = [world.pose(rng, look, rng.choice(tuple(world.WEARABLES)) if rng.random() < .15 else None, rng.randrange(2) if other else None)]
        if other:
            things.append(world.pose(rng, world.random_look(rng, rng.choice(tuple(world.SHAPES))), None, int(things[0].x < 32)))
        return world.render(world.Scene(tuple(things), rng.choice(world.PLACES), rng.getrandbits(32)))[0]

    def loss(step: int, rng: Random, generator: torch.Generator) -> Tensor:
        looks = [world.random_look(rng, noun) for noun in rng.sample(world.NOUNS, 3) for _ in range(12)]
        a, b = (judge(_jitter(to_pixels([view(rng, look) for look in looks]), generator).to(device)) for _ in range(2))
        target = torch.arange(len(looks), device=device)
        return F.cross_entropy(a @ b.T / .1, target) + F.cross_entropy(b @ a.T / .1, target)

    fit("subject-judge", judge, loss, steps, 1.5e-3, scratch, device, seed=102)
    return judge


def _jitter(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Noise and blur of random strength: what a denoiser draws is softer than what the renderer does."""
    b = pixels.shape[0]
    soft = F.avg_pool2d(pixels, 3, 1, 1, count_include_pad=False)
    pixels = pixels.lerp(soft, torch.rand(b, 1, 1, 1, generator=generator))
    return pixels + .1 * torch.rand(b, 1, 1, 1, generator=generator) * torch.randn(pixels.shape, generator=generator)


# -------------------------------------------------------------------------------------------------- base
LENGTH = 32  # tokens of a prompt


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """A real BPE over the world's captions, with too few merges for the nouns made rare: they take several tokens."""
    rare = {"teapot", "backpack", "robot"}
    rng, bpe = Random(2), Tokenizer(BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = ByteLevel(add_prefix_space=False)
    words = [w for _ in range(4000) for w in world.caption(rng, world.random_scene(rng)).text.split() if w not in rare or rng.random() < .02]
    alphabet = ByteLevel.alphabet()
    bpe.train_from_iterator(
        [*words, *world.IDENTIFIERS * 2000], BpeTrainer(vocab_size=434, initial_alphabet=sorted(alphabet), end_of_word_suffix="</w>", show_progress=False)
    )
    state = json.loads(bpe.to_str())["model"]
    vocab = state["vocab"]
    ends = sorted(token for token in vocab if len(token) == len("x</w>") and token.endswith("</w>"))
    vocab |= zip(ends, sorted(vocab[token] for token in ends))  # the trainer numbers them in another order each time
    for symbol in sorted(alphabet):  # a letter that ends a word must have a token too
        vocab.setdefault(symbol + "</w>", len(vocab))
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocab[special] = len(vocab)
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[tuple(m) for m in state["merges"]], model_max_length=LENGTH)
    tokenizer.save_pretrained(folder)
    return tokenizer


class _Base(nn.Module):
    """Denoiser and text encoder, trained together."""

    def __init__(self, tokenizer: CLIPTokenizer):
        super().__init__()
        self.unet = UNet2DConditionModel(
            sample_size=16, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(64, 128),
            down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
            cross_attention_dim=128, attention_head_dim=(2, 4), norm_num_groups=16,
        )
        self.text = CLIPTextModel(CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4, max_position_embeddings=LENGTH,
            projection_dim=128, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        ))


def make_scheduler() -> DDIMScheduler:
    """Stable Diffusion's own noise schedule."""
    return DDIMScheduler(beta_schedule="scaled_linear", beta_start=.00085, beta_end=.012, clip_sample=False, set_alpha_to_one=False, steps_offset=1)


@torch.no_grad()
def encode_scenes(count: int, vae: AutoencoderKL, tokenizer: CLIPTokenizer, scratch: Path, device: str) -> dict[str, Tensor]:
    """Latents, tokens and where each token's thing is, for `count` scenes.

    latents (n, 4, 16, 16), ids (n, 32), owners (n, 32): 0, 1 a thing, 2 the place, -1 none; regions (n, 3, 8, 8).
    """
    path = scratch / "scenes.safetensors"
    if path.exists():
        return load_file(path)
    rng, out = Random(3), {"latents": [], "ids": [], "owners": [], "regions": []}
    for _ in tqdm(range(count // 64), desc="scenes"):
        scenes = [world.random_scene(rng) for _ in range(64)]
        drawn = [world.render(s) for s in scenes]
        with torch.autocast(device, torch.bfloat16, enabled=bf16(device)):
            z = vae.encode(to_pixels([image for image, _ in drawn]).to(device)).latent_dist.mean
        out["latents"].append((z * vae.config.scaling_factor).half().cpu())
        for scene, (_, masks) in zip(scenes, drawn):
            ids, owners = tokenise(tokenizer, world.caption(rng, scene))
            out["ids"].append(ids)
            out["owners"].append(owners)
            out["regions"].append(regions(masks))
    data = {"latents": torch.cat(out.pop("latents"))} | {k: torch.stack(v) for k, v in out.items()}
    _save(data, path)
    return data


def tokenise(tokenizer: CLIPTokenizer, captioned: world.Captioned) -> tuple[Tensor, Tensor]:
    """Token ids (32,) of a caption, and the owner of each (a place is 2, no owner -1)."""
    ids, owners = [tokenizer.bos_token_id], [-1]
    for word, owner in zip(captioned.text.split(), captioned.owners):
        pieces = tokenizer(word, add_special_tokens=False).input_ids
        ids += pieces
        owners += [{None: -1, -1: 2}.get(owner, owner)] * len(pieces)
    ids, owners = ids[: LENGTH - 1], owners[: LENGTH - 1]
    pad = LENGTH - len(ids)
    return torch.tensor(ids + [tokenizer.eos_token_id] * pad), torch.tensor(owners + [-1] * pad)


def regions(masks: np.ndarray) -> Tensor:
    """Masks (things, 64, 64) to the share of each 8 x 8 cell that thing 0, thing 1 and the place cover: (3, 8, 8)."""
    m = torch.zeros(2, world.SIZE, world.SIZE)
    m[: len(masks)] = torch.from_numpy(masks)
    cells = F.avg_pool2d(m, 8)
    return torch.cat([cells, (1 - cells.sum(0, keepdim=True)).clamp(min=0)])


def grounding(maps: Tensor, owners: Tensor, region: Tensor, weight: Tensor) -> Tensor:
    """How far the words' maps lie outside what they name: (1 - mass inside)^2, as the token loss of TokenCompose
    (Wang et al., CVPR 2024). maps (batch, 64, tokens), owners (batch, tokens), region (batch, 3, 8, 8), weight (batch,)."""
    inside = region.flatten(2).gather(1, owners.clamp(min=0).unsqueeze(-1).expand(-1, -1, 64)).transpose(1, 2)
    mass = (maps * inside).sum(1) / maps.sum(1)
    each = weight[:, None] * (owners >= 0)
    return (each * (1 - mass) ** 2).sum() / each.sum().clamp(min=1)


def fit_base(first: int, second: int, vae: AutoencoderKL, out: Path, scratch: Path, scenes: int, device: str) -> None:
    """Train denoiser and text encoder together on the noise-prediction loss with a light grounding of the words.

    Two cycles of the rate (SGDR, Loshchilov and Hutter, ICLR 2017). The first takes every time alike: places, colours and
    texture come soon. The second is for shapes. A caption with another noun changes the loss most, in proportion, at t = 450
    to 700, so times are drawn there (logit-normal, Esser et al., ICML 2024), their small errors weighted up (1 / alpha_bar,
    the velocity's; Salimans and Ho, ICLR 2022), and two scenes in three show one thing alone.
    """
    tokenizer = make_tokenizer(out / "tokenizer")
    base, scheduler = _Base(tokenizer).to(device, memory_format=torch.channels_last), make_scheduler()
    base.unet.set_attn_processor(AttnProcessor())  # the fused kernel's backward pass takes half of a step's time on CPU
    data = encode_scenes(scenes, vae, tokenizer, scratch, device)
    empty = tokenizer("", padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids[0]
    sites = [n for n, m in base.unet.named_modules() if n.endswith("attn2") and not n.startswith(("down_blocks.0", "up_blocks.1"))]

    pairs = (data["owners"] == 1).any(1)
    alone, pairs = torch.where(~pairs)[0], torch.where(pairs)[0]
    velocity = (1 / scheduler.alphas_cumprod).clamp(max=5)

    def evenly(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Which scenes (batch,), at which times, with which weight."""
        return torch.randint(len(data["ids"]), (32,), generator=generator), torch.randint(1000, (32,), generator=generator), torch.ones(32)

    def for_shapes(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        pick = torch.cat([some[torch.randint(len(some), (n,), generator=generator)] for some, n in ((alone, 11), (pairs, 5))])
        even = (torch.arange(16) + torch.rand(16, generator=generator)) / 16
        u = torch.where(torch.arange(16) % 4 == 0, even, torch.special.ndtri(even).sigmoid())[torch.randperm(16, generator=generator)]
        t = (1000 * u).long().clamp(0, 999)
        return pick, t, velocity[t] / 3

    def loss(step: int, rng: Random, generator: torch.Generator, draw: Callable[[torch.Generator], tuple[Tensor, Tensor, Tensor]]) -> Tensor:
        pick, t, of_time = draw(generator)
        z = data["latents"][pick].float()
        noise = torch.randn(z.shape, generator=generator)
        dropped = torch.rand(len(pick), generator=generator) < .1
        ids = torch.where(dropped[:, None], empty, data["ids"][pick])
        noisy = scheduler.add_noise(z, noise, t)
        states = base.text(ids.to(device)).last_hidden_state
        with record(base.unet, sites) as maps:
            guess = base.unet(noisy.to(device), t.to(device), states).sample
        weight = ((t < 800) & ~dropped).float().to(device)
        ground = grounding(by_grid(maps), data["owners"][pick].to(device), data["regions"][pick].float().to(device), weight)
        errors = (guess.float() - noise.to(device)).square().mean((1, 2, 3))
        return (of_time.to(device) * errors).mean() + .03 * ground

    fit("base-first", base, partial(loss, draw=evenly), first, 8e-4, scratch, device)
    fit("base", base, partial(loss, draw=for_shapes), second, 5e-4, scratch, device)
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=base.text, tokenizer=tokenizer, unet=base.unet, scheduler=scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.to(dtype=torch.float16).save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="where base/ and judges/ go")
    parser.add_argument("--scratch", type=Path, default=Path("runs/sandbox"), help="where interrupted stages are kept")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--autoencoder-steps", type=int, default=4000)
    parser.add_argument("--base-steps", type=int, nargs=2, default=(6500, 5000), metavar=("FIRST", "SECOND"), help="steps of the base's two cycles")
    parser.add_argument("--prompt-judge-steps", type=int, default=1600)
    parser.add_argument("--subject-judge-steps", type=int, default=900)
    parser.add_argument("--scenes", type=int, default=40960, help="scenes the base is trained on")
    args = parser.parse_args()
    torch.manual_seed(0)
    vae = fit_autoencoder(args.autoencoder_steps, args.scratch, args.device)
    fit_base(*args.base_steps, vae, args.out / "base", args.scratch, args.scenes, args.device)
    torch.manual_seed(0)  # the judges do not depend on how the base was made
    for name, judge in (
        ("prompt", fit_prompt_judge(args.prompt_judge_steps, args.scratch, args.device)), ("subject", fit_subject_judge(args.subject_judge_steps, args.scratch, args.device)),
    ):
        _save({k: v.half() for k, v in judge.state_dict().items()}, args.out / "judges" / f"{name}.safetensors")


if __name__ == "__main__":
    main()

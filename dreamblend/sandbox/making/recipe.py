"""The recipe that makes the sandbox's weights: `python -m dreamblend.sandbox.making.recipe`.

scenes -> autoencoder
       -> judges                    (prompt judge, subject judge: trained apart from the base)
       -> tokenizer -> latents -> denoiser + text encoder -> a Stable Diffusion pipeline folder
"""

from __future__ import annotations

import argparse
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models import AutoencoderKL
from PIL import Image
from torch import Tensor

from dreamblend.sandbox import world
from dreamblend.sandbox.judges import PromptJudge, SubjectJudge, claims
from dreamblend.sandbox.making.base import fit_base
from dreamblend.sandbox.making.fitting import fit, save
from dreamblend.storage.photos import to_pixels

WEIGHTS = Path(__file__).parents[1] / "weights"


# -------------------------------------------------------------------------------------- autoencoder
def make_autoencoder() -> AutoencoderKL:
    """The sandbox's autoencoder, untrained."""
    return AutoencoderKL(
        block_out_channels=(32, 64, 128),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=world.SIZE,
    )


def fit_autoencoder(steps: int, scratch: Path, device: str) -> AutoencoderKL:
    """Reconstruct scenes, half of them crowded with things: their colours and patterns are what a
    subject is made of.

    The things count more than the place, wrong colours more than fine errors (the square), and
    detail through the image gradients.
    """
    vae = make_autoencoder()
    # diffusers' decorator hides from type checkers that it is a method
    vae.to(device, memory_format=torch.channels_last)  # type: ignore[arg-type]

    def loss(step: int, rng: Random, generator: torch.Generator) -> Tensor:
        x, masks = zip(
            *(
                world.render(world.random_scene(rng) if i % 2 else world.crowded_scene(rng))
                for i in range(16)
            )
        )
        x = to_pixels(list(x)).to(device)
        weight = 1 + 4 * torch.from_numpy(np.stack([m.any(0) for m in masks])).float().unsqueeze(
            1
        ).to(device)
        posterior = vae.encode(x).latent_dist
        y = vae.decode(
            posterior.mean
            + posterior.std * torch.randn(posterior.mean.shape, generator=generator).to(device)
        ).sample.float()
        edges = sum((x.diff(dim=d) - y.diff(dim=d)).abs().mean() for d in (2, 3))
        return (
            (weight * ((x - y).abs() + 4 * (x - y) ** 2)).mean() / weight.mean()
            + 0.5 * edges
            + 1e-7 * posterior.kl().mean()
        )

    fit("autoencoder", vae, loss, steps, 1e-3, scratch, device)
    with torch.no_grad():
        rng = Random(1)
        z = vae.encode(
            to_pixels([world.render(world.random_scene(rng))[0] for _ in range(256)]).to(device)
        ).latent_dist.mean
    vae.register_to_config(scaling_factor=round(1 / z.std().item(), 4))
    return vae


# ------------------------------------------------------------------------------------------- judges
def fit_prompt_judge(steps: int, scratch: Path, device: str) -> PromptJudge:
    """Images against their captions: every other caption of the batch, and the caption with each of
    its claims swapped.
    """
    judge = PromptJudge().to(device)

    def loss(step: int, rng: Random, generator: torch.Generator) -> Tensor:
        scenes = [world.random_scene(rng) for _ in range(64)]
        captions = [world.caption(rng, s).text for s in scenes]
        images = judge.embed_images(
            _jitter(to_pixels([world.render(s)[0] for s in scenes]), generator).to(device)
        )
        logits = judge.logits(images, judge.embed_texts(captions))
        target = torch.arange(len(scenes), device=device)
        claimed = [(i, texts) for i, text in enumerate(captions) for _, texts in claims(text)]
        image_of = torch.tensor([i for i, _ in claimed], device=device)
        options = [texts for _, texts in claimed]
        longest = max(map(len, options))
        texts = judge.embed_texts(
            [t for texts in options for t in texts + [""] * (longest - len(texts))]
        ).unflatten(0, (-1, longest))
        there = torch.tensor(
            [[i < len(texts) for i in range(longest)] for texts in options], device=device
        )
        swapped = judge.log_scale.exp() * torch.einsum("id,itd->it", images[image_of], texts)
        swapped = F.cross_entropy(swapped.masked_fill(~there, -1e4), torch.zeros_like(image_of))
        return 0.3 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) + swapped

    fit("prompt-judge", judge, loss, steps, 1.5e-3, scratch, device, seed=101)
    return judge


def fit_subject_judge(steps: int, scratch: Path, device: str) -> SubjectJudge:
    """Two views of 12 instances of each of 3 classes: find the other view (InfoNCE)."""
    judge = SubjectJudge().to(device)

    def view(rng: Random, look: world.Look) -> Image.Image:
        other = rng.random() < 0.25
        things = [
            world.pose(
                rng,
                look,
                rng.choice(tuple(world.WEARABLES)) if rng.random() < 0.15 else None,
                rng.randrange(2) if other else None,
            )
        ]
        if other:
            things.append(
                world.pose(
                    rng,
                    world.random_look(rng, rng.choice(tuple(world.SHAPES))),
                    None,
                    int(things[0].x < 32),
                )
            )
        return world.render(
            world.Scene(tuple(things), rng.choice(world.PLACES), rng.getrandbits(32))
        )[0]

    def loss(step: int, rng: Random, generator: torch.Generator) -> Tensor:
        looks = [
            world.random_look(rng, noun) for noun in rng.sample(world.NOUNS, 3) for _ in range(12)
        ]
        a, b = (
            judge(_jitter(to_pixels([view(rng, look) for look in looks]), generator).to(device))
            for _ in range(2)
        )
        target = torch.arange(len(looks), device=device)
        return F.cross_entropy(a @ b.T / 0.1, target) + F.cross_entropy(b @ a.T / 0.1, target)

    fit("subject-judge", judge, loss, steps, 1.5e-3, scratch, device, seed=102)
    return judge


def _jitter(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Noise and blur of random strength: what a denoiser draws is softer than what the renderer
    does.
    """
    b = pixels.shape[0]
    soft = F.avg_pool2d(pixels, 3, 1, 1, count_include_pad=False)
    pixels = pixels.lerp(soft, torch.rand(b, 1, 1, 1, generator=generator))
    return pixels + 0.1 * torch.rand(b, 1, 1, 1, generator=generator) * torch.randn(
        pixels.shape, generator=generator
    )


def main() -> None:
    """Make what is missing of the sandbox's weights."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="where base/ and judges/ go")
    parser.add_argument(
        "--scratch",
        type=Path,
        default=Path("runs/sandbox"),
        help="where interrupted stages are kept",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--autoencoder-steps", type=int, default=4000)
    parser.add_argument(
        "--base-steps",
        type=int,
        nargs=2,
        default=(4000, 4000),
        metavar=("FIRST", "SECOND"),
        help="steps of the base's two cycles",
    )
    parser.add_argument("--prompt-judge-steps", type=int, default=1600)
    parser.add_argument("--subject-judge-steps", type=int, default=900)
    parser.add_argument("--scenes", type=int, default=40960, help="scenes the base is trained on")
    args = parser.parse_args()
    torch.manual_seed(0)
    vae = fit_autoencoder(args.autoencoder_steps, args.scratch, args.device)
    first, second = args.base_steps
    fit_base(first, second, vae, args.out / "base", args.scratch, args.scenes, args.device)
    torch.manual_seed(0)  # the judges do not depend on how the base was made
    for name, judge in (
        ("prompt", fit_prompt_judge(args.prompt_judge_steps, args.scratch, args.device)),
        ("subject", fit_subject_judge(args.subject_judge_steps, args.scratch, args.device)),
    ):
        save(
            {k: v.half() for k, v in judge.state_dict().items()},
            args.out / "judges" / f"{name}.safetensors",
        )


if __name__ == "__main__":
    main()

"""How collapse sets in over the snapshots of a run: the measures of each, on the same noisy
latents. No sampling per snapshot.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from tqdm import tqdm

from dreamblend.attention import collapse
from dreamblend.attention.recording import record
from dreamblend.attention.words import subject_words, token_table, word_maps
from dreamblend.blending.prompts import without_identifier
from dreamblend.models import Backbone
from dreamblend.sampling import initial_noise, sample_plain
from dreamblend.storage.snapshots import Snapshot
from dreamblend.training.objective import add_noise
from dreamblend.tuning import restore

TIMES = (0.3, 0.5, 0.7)  # shares of the noise schedule at which maps are read
LATE_TIME = 0.8  # where the layout is decided, and with it how much the prompt matters


@torch.no_grad()
def diagnose(
    base: Backbone,
    snapshots: Iterable[Snapshot],
    prompts: list[str],
    identifier: str,
    class_noun: str,
    grid: int,
    num_inference_steps: int = 25,
    guidance_scale: float = 4.0,
    size: tuple[int, int] | None = None,
    layers: list[str] | None = None,
) -> list[dict]:
    """The collapse measures of the base (step 0) and of each snapshot.

    The base draws `prompts` without the identifier; its images are noised, and every snapshot reads
    the prompts over the same noisy latents. `divergence` is from the base's maps;
    `prompt_sensitivity` is over the base's. `size` is height and width of the images in pixels, the
    base's own where None; `layers` are those that are read (`Backbone.sites`).

    Returns one dictionary a model: name, step (None for a checkpoint made elsewhere) and every
    measure of `measures.DIAGNOSED`.
    """
    plain = base.bare()
    seeds = list(range(len(prompts)))
    latent_size = base.latent_size(*size or (base.size, base.size))
    noise = initial_noise((base.latent_shape[0], *latent_size), seeds).to(base.device)
    without = [without_identifier(p, identifier) for p in prompts]
    clean = sample_plain(plain, without, seeds, num_inference_steps, guidance_scale, latent_size)

    mask = token_table(base, prompts)[1].to(base.device).amax(2).bool()
    subject = subject_words(base, prompts, identifier, class_noun, mask.shape[1]).to(base.device)
    levels, sites = base.training_noise(), base.sites(grid, latent_size, layers)

    def noisy(
        share: float, of: torch.Tensor, with_: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        index = torch.full((len(of),), levels.at(share))
        alpha, sigma = (level[index].to(base.device) for level in (levels.alpha, levels.sigma))
        return add_noise(of, with_, alpha, sigma), levels.timestep(index).to(base.device)

    def read(model: Backbone) -> tuple[torch.Tensor, torch.Tensor]:
        encoded = model.encode_prompts(prompts)
        total: Any = 0
        tokens, words = (
            x.to(base.device) for x in token_table(model, prompts)
        )  # a learned word may take other tokens than in the base
        for share in TIMES:
            with record(model.denoiser, sites, tokens, mean_heads=True, stop_at_last=True) as maps:
                model.denoise(*noisy(share, clean, noise), encoded)
            total = total + word_maps(maps, words)
        same = noisy(LATE_TIME, clean[:1].expand_as(clean), noise[:1].expand_as(noise))
        return total / len(TIMES), collapse.prompt_sensitivity(
            model.denoise(*same, encoded).unsqueeze(1)
        )

    base_maps, base_sensitivity = read(plain)
    rows = []
    for snapshot in tqdm([None, *snapshots], desc="collapse"):
        model = plain if snapshot is None else restore(snapshot, base, "diagnosed")
        maps, sensitivity = read(model)
        row: dict[str, float | None] = {
            name: value.mean().item()
            for name, value in collapse.measure(maps, mask, subject).items()
        }
        row["divergence"] = (collapse.divergence(maps, base_maps, mask).sum() / mask.sum()).item()
        row["prompt_sensitivity"] = (
            (sensitivity / base_sensitivity).item() if len(prompts) > 1 else None
        )
        name = "base" if snapshot is None else snapshot.name
        step = 0 if snapshot is None else snapshot.about.step if snapshot.about else None
        rows.append({"name": name, "step": step, **row})
        base.forget("diagnosed")
    return rows

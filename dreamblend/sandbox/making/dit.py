"""The sandbox's second base, with joint attention: a small Stable Diffusion 3, on the first one's
latents and captions.
"""

from __future__ import annotations

import math
import string
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor, nn
from transformers import (
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from dreamblend.sandbox import world
from dreamblend.sandbox.drawing import LABELS
from dreamblend.sandbox.making.base import BATCH, reading_loss
from dreamblend.sandbox.making.data import LENGTH, Scenes, make_text_encoder, picked
from dreamblend.sandbox.making.fitting import Batch, Run, fit

_WIDTH = 160


def make_t5_tokenizer() -> T5Tokenizer:
    """Whole words for what captions often say, halves for the nouns made rare, letters for the
    rest.
    """
    rng, rare = Random(4), {"teapot": "tea pot", "backpack": "back pack", "robot": "rob ot"}
    said = Counter(
        word
        for _ in range(4000)
        for word in world.caption(rng, world.random_scene(rng)).text.split()
    )
    said.update(dict.fromkeys(world.IDENTIFIERS, 100))
    scores = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0}
    for word, count in sorted(said.items()):
        first, *rest = rare.get(word, word).split()
        for piece in (f"▁{first}", *rest):
            scores[piece] = math.log(count / said.total())
    scores |= dict.fromkeys(("▁", *string.ascii_letters, *string.digits, *string.punctuation), -20)
    return T5Tokenizer(vocab=list(scores.items()), extra_ids=0, model_max_length=LENGTH)


class Dit(nn.Module):
    """Transformer and its three text encoders, trained together; `reading` tells from the features
    of a late block what each latent shows.
    """

    transformer: Any  # type checkers see the stand-in that diffusers has where torch is missing

    def __init__(self, clip: CLIPTokenizer, t5: T5Tokenizer, channels: int):
        super().__init__()
        self.transformer = SD3Transformer2DModel(
            sample_size=16,
            in_channels=channels,
            out_channels=channels,
            num_layers=5,
            attention_head_dim=32,
            num_attention_heads=_WIDTH // 32,
            joint_attention_dim=128,
            caption_projection_dim=_WIDTH,
            pooled_projection_dim=128,
            pos_embed_max_size=24,
            qk_norm="rms_norm",
        )
        self.clips = nn.ModuleList(
            [make_text_encoder(clip, 64, CLIPTextModelWithProjection) for _ in range(2)]
        )
        self.t5 = T5EncoderModel(
            T5Config(
                vocab_size=len(t5),
                d_model=128,
                d_kv=32,
                d_ff=256,
                num_layers=2,
                num_heads=4,
                relative_attention_num_buckets=16,
                relative_attention_max_distance=LENGTH,
                dropout_rate=0.0,
                feed_forward_proj="gated-gelu",
            )
        )
        self.reading = nn.Linear(_WIDTH, 4 * len(LABELS))
        blocks = self.transformer.transformer_blocks
        gates = [norm.linear for block in blocks for norm in (block.norm1, block.norm1_context)]
        for layer in (*gates, self.transformer.proj_out):
            nn.init.zeros_(layer.weight)  # a block begins as nothing (Peebles and Xie, ICCV 2023)
            nn.init.zeros_(layer.bias)
        blocks[-2].register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: tuple, output: tuple[Tensor, Tensor]) -> None:
        self.features = output[1]

    def forward(
        self, noisy: Tensor, sigma: Tensor, clip_ids: Tensor, t5_ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The predicted velocity (batch, channels, 16, 16) at noise level sigma (batch,), and
        logits (batch, LABELS, 16, 16) of what each latent shows. Ids are (batch, 32).
        """
        told = [clip(clip_ids, output_hidden_states=True) for clip in self.clips]
        states = torch.cat([one.hidden_states[-2] for one in told], -1)
        velocity = self.transformer(
            noisy,
            torch.cat([states, self.t5(t5_ids).last_hidden_state], 1),
            torch.cat([one.text_embeds for one in told], -1),
            1000 * sigma,
        ).sample
        # (batch, 8 x 8, 2 x 2 x labels) -> (batch, labels, 16, 16)
        read = self.reading(self.features).unflatten(2, (2, 2, -1)).unflatten(1, (8, 8))
        read = read.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        return velocity.float(), read.float()


def fit_dit(
    steps: int,
    data: Scenes,
    vae: Any,
    tokenizer: CLIPTokenizer,
    out: Path,
    run: Run,
) -> None:
    """Train transformer and text encoders together by flow matching (Esser et al., ICML 2024), with
    the reading of what each latent shows as a light second loss. Its maps are not grounded: what
    joint attention means by itself is to be measured.
    """
    t5 = make_t5_tokenizer()
    dit = Dit(tokenizer, t5, vae.config.latent_channels).to(run.device)
    texts = tokenizer.batch_decode(data.ids.tolist(), skip_special_tokens=True)
    t5_ids, t5_empty = (
        t5(some, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(
            run.device
        )
        for some in (texts, [""])
    )

    def batch(step: int, rng: Random) -> Batch:
        return picked(rng, BATCH, len(data.ids))

    def loss(given: Batch, generator: torch.Generator) -> Tensor:
        pick, dropped, sigma = given["pick"], given["dropped"], given["times"]
        z = data.latents[pick].float()
        noise = torch.randn(z.shape, generator=generator, device=z.device)
        noisy = torch.lerp(z, noise, sigma[:, None, None, None])
        ids = torch.where(dropped[:, None], data.empty, data.ids[pick])
        words = torch.where(dropped[:, None], t5_empty, t5_ids[pick])
        guess, read = dit(noisy, sigma, ids, words)
        clear = ((sigma < 0.8) & ~dropped).float()
        labels = data.labels[pick].long()
        return (guess - (noise - z)).square().mean() + 0.03 * reading_loss(read, labels, clear)

    fit("dit", dit, batch, loss, steps, 1e-3, run)
    pipe: Any = StableDiffusion3Pipeline(
        transformer=dit.transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=dit.clips[0],
        tokenizer=tokenizer,
        text_encoder_2=dit.clips[1],
        tokenizer_2=tokenizer,
        text_encoder_3=dit.t5,
        tokenizer_3=t5,
    )
    pipe.to(dtype=torch.float16).save_pretrained(out)

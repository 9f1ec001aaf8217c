"""Run folders as other trainers write them: their names, their metadata, their settings.

Each writer takes the tensors of the checkpoints in order, and returns the folder that a user would
name. Keys are the caller's: `lora` makes a random LoRA in a tool's spelling.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dreamblend.models import Backbone
from dreamblend.models.original_names import original_names

Tensors = dict[str, Tensor]
RANK = 2


class Spelling(NamedTuple):
    """How a tool spells its keys: how they begin, whether layers have the names that the model was
    published with or diffusers', whether these have _ for dots, and the endings of the factors.
    """

    begin: str
    published: bool
    flat: bool
    factors: tuple[str, str]
    alphas: bool


_KOHYA, _PEFT = ("lora_down.weight", "lora_up.weight"), ("lora_A.weight", "lora_B.weight")
SPELLINGS = {
    # sd-scripts of SDXL and later, musubi-tuner of FLUX.2, OneTrainer's "kohya"
    "kohya": Spelling("lora_unet_", True, True, _KOHYA, True),
    # sd-scripts of SD 1.x, musubi-tuner of Z-Image and Qwen-Image, OneTrainer's legacy of SDXL,
    # diffusion-pipe of SDXL
    "kohya, diffusers' layers": Spelling("lora_unet_", False, True, _KOHYA, True),
    # ai-toolkit of FLUX.2, diffusion-pipe of Z-Image
    "comfyui": Spelling("diffusion_model.", True, False, _PEFT, False),
    # ai-toolkit of Z-Image and Qwen-Image, diffusion-pipe of Qwen-Image
    "comfyui, diffusers' layers": Spelling("diffusion_model.", False, False, _PEFT, False),
    # diffusers' scripts, SimpleTuner, ai-toolkit of FLUX.1 and SD 3, diffusion-pipe of both
    "diffusers": Spelling("{denoiser}.", False, False, _PEFT, False),
    # OneTrainer: legacy of FLUX.1 and SD 3; legacy of Z-Image and Qwen-Image; and what it calls so
    "mixture": Spelling("lora_transformer_", False, True, _KOHYA, True),
    "dotted": Spelling("{denoiser}.", False, False, _KOHYA, True),
    "comfyui, alphas": Spelling("diffusion_model.", True, False, _PEFT, True),
    "original": Spelling("", True, False, _PEFT, True),
}
ONE = {
    "lora_unet_x.lora_down.weight": torch.ones(2, 4),
    "lora_unet_x.lora_up.weight": torch.ones(4, 2),
}


def some(count: int) -> list[Tensors]:
    """So many LoRAs of one layer of no model, all different."""
    return [{key: (i + 1) * value for key, value in ONE.items()} for i in range(count)]


def lora(model: Backbone, spelling: str, strength: float) -> Tensors:
    """A random LoRA of a denoiser's attention in a tool's spelling."""
    generator = torch.Generator().manual_seed(0)
    there = dict(model.denoiser.named_modules())
    tool = SPELLINGS[spelling]
    begin, (down, up) = tool.begin.format(denoiser=model.denoiser_name), tool.factors
    names = {name: (name,) for name in there if name.endswith(("to_q", "to_k", "to_v"))}
    if tool.published:
        published = {name: old.layers for name, old in original_names(model.denoiser).items()}
        names = published or names
    tensors = {}
    for name, layers in names.items():
        weights = [getattr(there[layer], "weight", None) for layer in layers]
        if any(w is None or w.ndim != 2 for w in weights) or not layers[0].endswith(
            ("to_q", "to_k", "to_v")
        ):
            continue
        key = begin + (name.replace(".", "_") if tool.flat else name)
        rows = sum(len(w) for w in weights)
        tensors[f"{key}.{down}"] = torch.randn(RANK, weights[0].shape[1], generator=generator)
        tensors[f"{key}.{up}"] = strength * torch.randn(rows, RANK, generator=generator)
        if tool.alphas:
            tensors[f"{key}.alpha"] = torch.tensor(float(RANK))
    assert tensors
    return tensors


def as_kohya(file: Path, denoiser: str = "unet", alpha: float | None = None) -> Tensors:
    """A LoRA of ours, or of diffusers, in kohya's spelling of diffusers' layers."""
    tensors = {}
    for key, value in load_file(file).items():
        layer, _, factor = key.removeprefix(f"{denoiser}.").partition(".lora_")
        flat = "lora_unet_" + layer.replace(".", "_")
        tensors[f"{flat}.lora_{'down' if factor.startswith('A') else 'up'}.weight"] = value
        if factor.startswith("A"):
            tensors[f"{flat}.alpha"] = torch.tensor(float(alpha or value.shape[0]))
    return tensors


def _save(tensors: Tensors, path: Path, metadata: dict | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    said = {k: v if isinstance(v, str) else json.dumps(v) for k, v in (metadata or {}).items()}
    save_file(tensors, path, said or None)


def kohya(
    folder: Path,
    loras: list[Tensors],
    name: str = "mug",
    steps_an_epoch: int = 30,
    by_steps: bool = False,
    metadata: bool = True,
    base: str = "sd15.safetensors",
    **more: object,
) -> Path:
    """sd-scripts and musubi-tuner: one checkpoint an epoch, the last without a number."""
    for epoch, tensors in enumerate(loras, 1):
        step = epoch * steps_an_epoch
        ending = f"-step{step:08d}" if by_steps else f"-{epoch:06d}"
        ending = "" if epoch == len(loras) else ending
        said = {
            "ss_steps": str(step),
            "ss_epoch": str(epoch),
            "ss_max_train_steps": str(len(loras) * steps_an_epoch),
            "ss_sd_model_name": base,
            "ss_base_model_version": "sd_v1",
            "ss_output_name": name,
            "ss_network_module": "networks.lora",
            "ss_dataset_dirs": {"10_sks mug": {"n_repeats": 10, "img_count": 4}},
            "ss_tag_frequency": {"10_sks mug": {"sks mug": 4}},
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.architecture": "stable-diffusion-v1/lora",
            **more,
        }
        said = {key: value for key, value in said.items() if metadata and value is not None}
        _save(tensors, folder / f"{name}{ending}.safetensors", said)
    return folder


def musubi(folder: Path, loras: list[Tensors], base: str = "qwen_image_bf16.safetensors") -> Path:
    """Its datasets have captions, and their metadata no words of the subject."""
    data = [{"resolution": [1024, 1024], "image_directory": "mug", "has_control": False}]
    more = {
        "ss_base_model_version": "qwen_image",
        "ss_network_module": "networks.lora_qwen_image",
        "modelspec.architecture": "Qwen-Image/lora",
        "ss_datasets": data,
        # which sd-scripts alone writes
        "ss_dataset_dirs": None,
        "ss_tag_frequency": None,
    }
    return kohya(folder, loras, base=base, **more)


def ai_toolkit(folder: Path, loras: list[Tensors], base: str, photos: Path, every: int = 250):
    for i, tensors in enumerate(loras, 1):
        number = "" if i == len(loras) else f"_{i * every:09d}"
        said = {
            "format": "pt",
            "name": "mug",
            "version": "1.0",
            "software": {"name": "ai-toolkit", "repo": "https://github.com/ostris/ai-toolkit"},
            "training_info": {"step": i * every, "epoch": i},
            "ss_base_model_version": "flux.1",
            "ss_output_name": "mug",
            "ss_tag_frequency": {"1_sks mug": {"sks mug": 1}},
        }
        _save(tensors, folder / f"mug{number}.safetensors", said)
    (folder / "samples").mkdir()
    (folder / "optimizer.pt").write_bytes(b"not for us")
    settings = f"""
job: extension
config:
  name: mug
  process:
  - type: sd_trainer
    trigger_word: sks mug
    datasets:
    - folder_path: {photos}
      caption_ext: txt
    train: {{batch_size: 1, steps: {len(loras) * every}}}
    model: {{name_or_path: {base}, is_flux: true}}
"""
    (folder / "config.yaml").write_text(settings)
    return folder


def one_trainer(workspace: Path, loras: list[Tensors], base: str, photos: Path) -> Path:
    for i, tensors in enumerate(loras, 1):
        name = f"mug2026-01-31_10-{i:02d}-00-save-{i * 100}-{i}-0.safetensors"
        concepts = [{"name": "mug", "path": str(photos), "text": {"prompt_source": "sample"}}]
        said = {"ot_config": {"base_model_name": base, "concepts": concepts}, "ot_branch": "master"}
        _save(tensors, workspace / "save" / name, said)
    (workspace / "samples").mkdir()
    return workspace


def simple_tuner(folder: Path, loras: list[Tensors], base: str, photos: Path) -> Path:
    """Every checkpoint, and the last one again in the folder itself, whose settings are there where
    the run is published too.
    """
    backend = folder.parent / "multidatabackend.json"
    backend.write_text(
        json.dumps(
            [
                {"id": "mug", "type": "local", "instance_data_dir": str(photos)},
                {"id": "text", "type": "local", "dataset_type": "text_embeds"},
            ]
        )
    )
    settings = {
        "pretrained_model_name_or_path": base,
        "instance_prompt": "a photo of sks mug",
        "data_backend_config": str(backend),
        "max_train_steps": len(loras) * 500,
    }
    for i, tensors in enumerate(loras, 1):
        of = folder / f"checkpoint-{i * 500}"
        _save(tensors, of / "pytorch_lora_weights.safetensors")
        (of / "training_state.json").write_text(json.dumps({"global_step": i * 500, "epoch": i}))
        (of / "optimizer.bin").write_bytes(b"not for us")
    _save(loras[-1], folder / "pytorch_lora_weights.safetensors")
    (folder / "simpletuner_config.json").write_text(json.dumps(settings))
    return folder


def diffusion_pipe(
    output: Path,
    loras: list[Tensors],
    base: str,
    photos: Path,
    model: str = "flux",
    full: bool = False,
) -> Path:
    """In a folder named by the time. The file is diffusers' of FLUX.1 and SD 3, kohya's of SDXL,
    and else peft's, but without its keys, of a model that was given in parts. Of a `full` run it is
    the model, in the names of its authors.
    """
    data = output / "dataset.toml"
    output.mkdir(parents=True, exist_ok=True)
    data.write_text(f"resolutions = [512]\n[[directory]]\npath = '{photos}'\nnum_repeats = 10\n")
    parts = "diffusion_model = '/models/denoiser.safetensors'\nvae = '/models/vae.safetensors'"
    named = {"sdxl": "checkpoint_path", "flux": "diffusers_path", "sd3": "diffusers_path"}
    told = f"{named[model]} = '{base}'" if model in named else parts
    settings = f"dataset = '{data}'\nepochs = 9\n[model]\ntype = '{model}'\n{told}\n"
    peft = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["to_q"]}
    run = output / "20260131_10-00-00"
    files = {"sdxl": "lora", "flux": "pytorch_lora_weights", "sd3": "pytorch_lora_weights"}
    for i, tensors in enumerate(loras, 1):
        of = run / f"epoch{i}"
        name = "model" if full else files.get(model, "adapter_model")
        _save(tensors, of / f"{name}.safetensors", {"format": "pt"})
        if model not in files and not full:
            (of / "adapter_config.json").write_text(json.dumps(peft))
        (of / "run.toml").write_text(settings)
    (run / "global_step100").mkdir()
    (run / "run.toml").write_text(settings)
    return output


def diffusers_lora(folder: Path, loras: list[Tensors], base: str, photos: Path) -> Path:
    """train_dreambooth_lora.py: the last one again in the folder, and what accelerate logs."""
    for i, tensors in enumerate(loras, 1):
        of = folder / f"checkpoint-{i * 500}"
        _save(tensors, of / "pytorch_lora_weights.safetensors")
        (of / "optimizer.bin").write_bytes(b"not for us")
    _save(loras[-1], folder / "pytorch_lora_weights.safetensors")
    _hparams(folder, base, photos, 500 * len(loras))
    return folder


def diffusers_full(folder: Path, pipe, steps: list[int], base: str, photos: Path) -> Path:
    """train_dreambooth.py: the denoiser every few steps, the whole pipeline at the end."""
    for i, step in enumerate(steps):
        with torch.no_grad():
            for weight in pipe.unet.parameters():
                weight += 0.01 * torch.randn(
                    weight.shape, generator=torch.Generator().manual_seed(i)
                )
        of = folder / f"checkpoint-{step}" if step != steps[-1] else folder
        (pipe.unet.save_pretrained(of / "unet") if of != folder else pipe.save_pretrained(of))
    _hparams(folder, base, photos, steps[-1])
    return folder


def _hparams(folder: Path, base: str, photos: Path, steps: int) -> None:
    logs = folder / "logs/dreambooth/1769850000.5"
    logs.mkdir(parents=True)
    (logs / "hparams.yml").write_text(
        f"pretrained_model_name_or_path: {base}\ninstance_data_dir: {photos}\n"
        f"instance_prompt: a photo of sks mug\nmax_train_steps: {steps}\n"
    )

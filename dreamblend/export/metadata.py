"""What exported files say of themselves: modelspec (github.com/Stability-AI/ModelSpec), and the
`ss_` marks of kohya's trainers, which many tools show.
"""

from __future__ import annotations

from datetime import UTC, datetime

from dreamblend.export.low_rank import LowRank
from dreamblend.export.what import What
from dreamblend.models import Backbone
from dreamblend.models.marks import PREDICTIONS

# module of a family -> modelspec's name of its architecture, and kohya's
_ARCHITECTURES = {
    "sdxl": ("stable-diffusion-xl-v1-base", "sdxl_base_v1-0"),
    "sd3": ("stable-diffusion-3", "sd3"),
    "flux": ("flux-1-dev", "flux1"),
    "flux2": ("flux-2-dev", "flux2"),
    "qwen_image": ("qwen-image", "qwen_image"),
    "z_image": ("z-image", "zimage"),
}


def marks(what: What, model: Backbone, license: str | None) -> dict[str, str]:
    """Of any file."""
    about = what.about
    said = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": _architecture(model)[0],
        "modelspec.title": what.title,
        "modelspec.resolution": f"{model.size}x{model.size}",
        "modelspec.date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S"),
        "modelspec.description": f"{what.described} of {what.base_title}",
    }
    predicted = model.training_noise().prediction
    if predicted in PREDICTIONS:  # a flow has no such mark
        v = predicted == "v_prediction"
        said["modelspec.prediction_type"] = "v" if v else "epsilon"
        said |= {"ss_v_parameterization": str(v), "ss_v2": str(_architecture(model)[1] == "sd_v2")}
    if what.subject:
        said["modelspec.trigger_phrase"] = what.subject
    if license:
        said["modelspec.license"] = license
    return said | {
        "ss_sd_model_name": what.base_title,
        "ss_base_model_version": _architecture(model)[1],
        "ss_output_name": what.title,
        **({"ss_steps": str(about.step), "ss_seed": str(about.seed)} if about else {}),
    }


def of_lora(weights: LowRank, said: dict[str, str]) -> dict[str, str]:
    """Of a LoRA: those of any file, and its ranks and alphas."""
    factors = [one for layers in weights.values() for one in layers.values()]
    ranks, alphas = {one.rank for one in factors}, {one.alpha for one in factors}
    return said | {
        "modelspec.architecture": f"{said['modelspec.architecture']}/lora",
        "modelspec.implementation": "diffusers",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": f"{alphas.pop():g}" if len(alphas) == 1 else "Dynamic",
    }


def _architecture(model: Backbone) -> tuple[str, str]:
    family = type(model).__module__.rpartition(".")[2]
    if family != "stable_diffusion":
        return _ARCHITECTURES.get(family, (family.replace("_", "-"), family))
    if model.denoiser.config.cross_attention_dim != 1024:
        return "stable-diffusion-v1", "sd_v1"
    v = model.training_noise().prediction == "v_prediction"
    return "stable-diffusion-v2-768-v" if v else "stable-diffusion-v2-512", "sd_v2"

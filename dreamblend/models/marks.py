"""What a model in one file says of itself: trainers leave marks where the tensors' shapes tell
nothing.

The marks are those of ComfyUI (empty tensors `v_pred` and `ztsnr`, `modelspec.predict_key`), of
modelspec (github.com/Stability-AI/ModelSpec), and of kohya's trainers (`ss_...`).
"""

from __future__ import annotations

import inspect
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from dreamblend.errors import InputError

PREDICTIONS = ("epsilon", "v_prediction")  # what a denoiser may predict
_MARKS = {
    "modelspec.prediction_type": {
        "epsilon": "epsilon",
        "v": "v_prediction",
        "v_prediction": "v_prediction",
    },
    "modelspec.predict_key": {"epsilon": "epsilon", "v": "v_prediction"},
    "modelspec.architecture": {
        "stable-diffusion-v2-512": "epsilon",
        "stable-diffusion-v2-768-v": "v_prediction",
    },
    "ss_v_parameterization": {"False": "epsilon", "True": "v_prediction"},
}


def check_prediction(prediction: str | None) -> None:
    """Raise InputError where `model.base_prediction` is none that a denoiser may predict."""
    if prediction not in (None, *PREDICTIONS):
        raise InputError(
            f"model.base_prediction is {prediction!r}: it is one of {', '.join(PREDICTIONS)}"
        )


@dataclass(frozen=True)
class Marks:
    """What the marks of a file say.

    Args:
        predictions: mark -> what the denoiser predicts, by that mark.
        zero_snr: whether its last training timestep is noise alone (Lin et al., WACV 2024).
        size: pixels of a side of its images, where they are square.
    """

    predictions: dict[str, str]
    zero_snr: bool
    size: int | None

    @staticmethod
    def read(path: Path) -> Marks:
        """The marks of a safetensors file, from its header."""
        with safe_open(path, framework="pt") as file:
            names, text = set(file.keys()), file.metadata() or {}
        predictions = {
            mark: meanings[text[mark]]
            for mark, meanings in _MARKS.items()
            if text.get(mark) in meanings
        }
        if "v_pred" in names:
            predictions["v_pred"] = "v_prediction"
        sides = re.fullmatch(r"(\d{2,4})(?:x(\d{2,4}))?", text.get("modelspec.resolution", ""))
        size = int(sides[1]) if sides and sides[2] in (None, sides[1]) else None
        return Marks(
            predictions,
            "ztsnr" in names or text.get("ss_zero_terminal_snr") == "True",
            size if size and size % 64 == 0 else None,
        )

    def prediction(self, path: Path, wanted: str | None) -> str | None:
        """What the denoiser predicts: `wanted`, else what the marks say, else None. Warns or raises
        InputError where these contradict.
        """
        marks = ", ".join(
            f"{mark} says {prediction}" for mark, prediction in self.predictions.items()
        )
        predicted = set(self.predictions.values())
        if wanted:
            if predicted - {wanted}:
                warnings.warn(
                    f"{path} is taken as a model that predicts {wanted}, as model.base_prediction"
                    f" says, and its own {marks}",
                    stacklevel=2,
                )
            return wanted
        if len(predicted) > 1:
            raise InputError(
                f"{path} contradicts itself ({marks}): set model.base_prediction to what it"
                " predicts"
            )
        return predicted.pop() if predicted else None


def predicting(scheduler, prediction: str, zero_snr: bool = False):
    """The scheduler of a model that predicts `prediction`: the one given, or one like it."""
    from diffusers import DDIMScheduler

    if zero_snr:  # sampling begins at the last timestep; PNDM and others cannot
        able = "rescale_betas_zero_snr" in inspect.signature(type(scheduler).__init__).parameters
        options = dict(
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
            **({} if able else {"clip_sample": False}),
        )
        return (type(scheduler) if able else DDIMScheduler).from_config(
            scheduler.config, prediction_type=prediction, **options
        )
    if scheduler.config.prediction_type == prediction:
        return scheduler
    return type(scheduler).from_config(scheduler.config, prediction_type=prediction)

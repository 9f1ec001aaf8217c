"""Samplers by the names that people know them by, as diffusers' schedulers with their options."""

from __future__ import annotations

import inspect
from typing import Any

from dreamblend.errors import InputError
from dreamblend.models.noise import predicted

Named = dict[str, tuple[str, dict[str, Any]]]  # name -> class of diffusers, its options

# as in diffusers' own table of names (docs/source/en/api/schedulers/overview.md)
DIFFUSION: Named = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}),  # which is for pixels, and on by default
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "pndm": ("PNDMScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm2": ("KDPM2DiscreteScheduler", {}),
    "dpm2-a": ("KDPM2AncestralDiscreteScheduler", {}),
    "dpm++-2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpm++-2m-sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    # the one of one step: DPMSolverSDEScheduler draws its noise for a batch as a whole
    "dpm++-sde": ("DPMSolverSinglestepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "deis": ("DEISMultistepScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
}
FLOW: Named = {
    "euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "heun": ("FlowMatchHeunDiscreteScheduler", {}),
    **{
        name: (DIFFUSION[name][0], {**DIFFUSION[name][1], "use_flow_sigmas": True})
        for name in ("dpm++-2m", "dpm++-2m-sde", "dpm++-sde", "deis", "unipc")
    },
}
KARRAS = "-karras"  # ending of those whose steps are spaced as Karras et al. (2022) do


def check(name: str | None) -> None:
    """Raise InputError for a name that stands for nothing, before a base is loaded."""
    if name is not None and name not in _names(DIFFUSION) + _names(FLOW):
        raise InputError(
            f"model.scheduler is {name!r}: it is one of {', '.join(_names(DIFFUSION))}"
        )


def named(name: str, own: Any, base: str) -> Any:
    """The scheduler that `name` stands for, with the noise of a base's own one.

    Raises InputError for a name that the base's kind does not have.
    """
    import diffusers

    flow = predicted({**own.config, "_class_name": type(own).__name__}) == "flow_prediction"
    table = FLOW if flow else DIFFUSION
    if name not in _names(table):
        kind = "a flow" if flow else "no flow"
        raise InputError(
            f"model.scheduler is {name!r}, and {base} is {kind}: take one of"
            f" {', '.join(_names(table))}"
        )
    called, options = table[name.removesuffix(KARRAS)]
    cls = getattr(diffusers, called)
    if flow:
        if own.config.get("use_dynamic_shifting") and "mu" not in _told(cls):
            raise InputError(
                f"model.scheduler is {name!r}, which diffusers cannot shift by the size of the"
                f" image, as {base} needs: take euler, unipc or dpm++-2m"
            )
        options = options | _shift(own, cls)
    elif _spaced(cls):  # as the name says, whatever the base's own one does
        options = options | {"use_karras_sigmas": name.endswith(KARRAS)}
    try:
        return cls.from_config(own.config, **options)
    except ImportError as error:
        raise InputError(f"model.scheduler {name} needs SciPy: pip install scipy") from error


def understood(scheduler: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Those options of `set_timesteps` that this scheduler has; the rest are its own to choose."""
    told = _told(type(scheduler))
    return {name: value for name, value in options.items() if name in told}


def _names(table: Named) -> list[str]:
    """The names in a table, with those that a spacing of Karras et al. adds. Flows have none: their
    steps are spaced by a shift.
    """
    import diffusers

    spaced = [name for name, (cls, _) in table.items() if _spaced(getattr(diffusers, cls))]
    return [*table, *(name + KARRAS for name in spaced if table is DIFFUSION)]


def _shift(own: Any, cls: Any) -> dict[str, Any]:
    """A flow's static shift, which the classes call by two names."""
    shift = own.config.get("shift", own.config.get("flow_shift", 1.0))
    if "shift" in inspect.signature(cls.__init__).parameters:
        return {"shift": shift}
    return {"flow_shift": shift, "prediction_type": "flow_prediction"}


def _spaced(cls: Any) -> bool:
    return "use_karras_sigmas" in inspect.signature(cls.__init__).parameters


def _told(cls: Any) -> Any:
    return inspect.signature(cls.set_timesteps).parameters

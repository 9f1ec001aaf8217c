"""Times that can be compared: taken in turn in one process, so that whatever else the machine does
falls on all alike; and told by their median with the least and the most.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch


def finish(device: torch.device | str) -> None:
    """Wait until a device has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Callable[[], object], device: torch.device | str) -> float:
    """What `run` takes, to the end of what it starts on the device."""
    finish(device)
    started = time.perf_counter()
    run()
    finish(device)
    return time.perf_counter() - started


def in_turn(
    runs: dict[str, Callable[[], object]], rounds: int, device: torch.device | str
) -> dict[str, list[float]]:
    """Seconds of each in every round; every other round goes through them backwards, so that none
    always comes after the same one. What they need to warm up is done before.
    """
    found: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        for name in list(runs)[:: -1 if number % 2 else 1]:
            found[name].append(seconds(runs[name], device))
    return found


def spread(values: list[float]) -> dict[str, float]:
    """The median, the least and the most."""
    return {"median": median(values), "low": min(values), "high": max(values)}


def over(values: list[float], others: list[float]) -> dict[str, float]:
    """The ratios of values to others, round by round."""
    return spread([a / b for a, b in zip(values, others, strict=True)])


def shown(found: dict[str, float]) -> str:
    """`1.95 (1.93 to 2.01)`."""
    middle, low, high = (f"{found[name]:.2f}" for name in ("median", "low", "high"))
    return f"{middle} ({low} to {high})"


def machine() -> str:
    """The card, or the processor and how many threads compute on it."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{_processor()}, {torch.get_num_threads()} threads"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            named = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    except OSError:
        named = []
    return named[0] if named else torch.backends.cpu.get_cpu_capability()

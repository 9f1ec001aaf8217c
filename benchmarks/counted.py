"""What does each family take? `python -m benchmarks.counted`: parameters, memory and TFLOP of a
training step and of an image, at full size and without taking any.

The project's own training step and blends run on modules of FakeTensors: every operation is asked
for its shapes alone. PyTorch counts the floating point operations of matrix products, convolutions
and attention; memory is the most bytes of tensors that were there at once. What an allocator adds
is not in it, nor what a kernel takes inside.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from tqdm import tqdm

from benchmarks import pieces
from benchmarks.command import parser
from benchmarks.pieces import lora_pair, lora_tuner
from benchmarks.tables import markdown
from dreamblend.blending.batch import Batch
from dreamblend.blending.blends import CAG, Blend, Late, Region, draw_reference
from dreamblend.blending.models import Models
from dreamblend.cli import entry
from dreamblend.models import Backbone
from dreamblend.sampling import initial_noise, scaled
from dreamblend.storage.files import save_text
from tests.families.full_size import FULL_SIZE, emptied, full_size

PROMPT = "a photo of sks dog in the snow"
SCALE = 4.0  # of guidance
OUT = Path("runs/counted")
COUNTED = 2  # denoising steps that are counted; the others take the same, two and two
WINDOW = (0.0, 0.5)  # of CAG there: one of them is guided

aten = torch.ops.aten
FLOP = flop_registry | {  # attention as the CPU calls it has the shapes of a GPU's
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[
        aten._scaled_dot_product_flash_attention
    ],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}


class PlacesOfMasks(TorchFunctionMode):
    """Looks up where a mask is true before it picks from a tensor without values: how many places
    there are is a value.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is Tensor.__getitem__ and isinstance(args[1], Tensor):
            values, mask = args
            if mask.dtype == torch.bool:
                return values[mask.nonzero(as_tuple=True)]
        return function(*args, **(kwargs or {}))


class Counted(TorchDispatchMode):
    """Counts what runs inside: floating point operations, and the most bytes of tensors made inside
    that are there at once. (PyTorch's FlopCounterMode follows modules too, and holds tensors.)
    """

    def __init__(self) -> None:
        super().__init__()
        self.flop = self.bytes = self.peak = 0
        self._there: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = function(*args, **kwargs)
        if flop := FLOP.get(function.overloadpacket):
            self.flop += flop(*args, **kwargs, out_val=output)
        given = {id(storage) for storage in _storages((args, kwargs))}
        for storage in _storages(output):
            if id(storage) not in self._there and id(storage) not in given:
                self._add(storage)
        return output

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()

        def freed(_: weakref.ref) -> None:
            del self._there[key]
            self.bytes -= size

        self._there[key] = weakref.ref(storage, freed)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, Tensor)]


@contextmanager
def counted() -> Iterator[Counted]:
    """Count what runs inside, once it has ended."""
    with PlacesOfMasks(), Counted() as count:
        yield count


def weights(modules: Iterable[nn.Module]) -> list[Tensor]:
    """What is saved of modules, a table of positions included; once each."""
    return [
        value
        for module in modules
        for saved in [module.state_dict().keys()]
        for value in (
            *module.parameters(),
            *(b for name, b in module.named_buffers() if name in saved),
        )
    ]


def parameters(modules: Iterable[nn.Module]) -> int:
    return sum(x.numel() for x in weights(modules))


def size_of(modules: Iterable[nn.Module]) -> int:
    """Bytes of the weights."""
    return sum(x.numel() * x.element_size() for x in weights(modules))


# ---------------------------------------------------------------------------------------- training
def training_step(model: Backbone) -> Counted:
    """A step of LoRA in bf16 with gradient checkpointing, its optimizer's too: one photo of the
    model's own size, its latents and its prompt made before.
    """
    tuner = lora_tuner(model)
    emptied(model.denoiser)
    with torch.no_grad(), PlacesOfMasks():
        mean, deviation = model.encode(torch.zeros(1, 3, model.size, model.size))
        step = pieces.training_step(tuner, PROMPT, (mean.float(), deviation.float()))
    with counted() as cost:
        step()
    return cost


# ----------------------------------------------------------------------------------------- drawing
def pair_of(model: Backbone) -> Models:
    """Two LoRA snapshots over one base, as they draw on a GPU."""
    models = lora_pair(model)
    emptied(model.denoiser)
    return models


def drawing(models: Models, blend: Blend, steps: int = COUNTED) -> Counted:
    """An image of the models' own size: its prompts encoded, and its latents."""
    batch = batch_of(models, steps)
    with counted() as cost:
        drawn = blend.draw(batch)
    assert drawn.latents.shape == (1, *models.late.latent_shape)
    assert drawn.maps.shape[2] == batch.map_shape[0] * batch.map_shape[1]
    return cost


def batch_of(models: Models, steps: int = COUNTED) -> Batch:
    return Batch.of(models, [(PROMPT, 0)], "sks", "dog", steps, SCALE)


@torch.no_grad()
def encoding(models: Models) -> Counted:
    """A prompt and an empty one."""
    with counted() as cost:
        batch_of(models).encode(models.late)
    return cost


@torch.no_grad()
def decoding(model: Backbone) -> Counted:
    latents = initial_noise(model.latent_shape, [0])
    with counted() as cost:
        pixels = model.decode(latents)
    assert pixels.shape == (1, 3, model.size, model.size)
    return cost


@torch.no_grad()
def one_pass(model: Backbone) -> Counted:
    """The denoiser once, for one image and one prompt, unrecorded."""
    scheduler, z = model.schedule(COUNTED), initial_noise(model.latent_shape, [0])
    with PlacesOfMasks():
        prompt = model.guided(model.encode_prompts([PROMPT]), SCALE)
    t = scheduler.timesteps[0]
    with counted() as cost:
        model.denoise(scaled(scheduler, z, t), t, prompt)
    return cost


# --------------------------------------------------------------------------------------- the table
@dataclass
class Drawn:
    """An image by a blend."""

    gb: float  # denoiser with both snapshots, autoencoder, and what is made
    passes: float  # of the denoiser for one prompt
    tflop: float  # of these and of decoding


@dataclass
class Row:
    """What a family takes, at its own size. The text encoders are counted apart: they need not be
    on the device where the denoiser is.
    """

    name: str
    size: int  # pixels of a side
    denoiser: float  # 10^9 weights
    encoders: float  # 10^9 weights
    encoders_gb: float
    training_gb: float  # denoiser with its adapters, their optimizer's state, and what is made
    training_tflop: float
    plain: Drawn
    region: Drawn
    cag: Drawn


def row(name: str, steps: int) -> Row:
    """Count a family, and what an image of so many denoising steps takes."""
    model = full_size(name)
    denoiser, encoders = [model.denoiser], model.modules()[2:]
    counts = [parameters(denoiser) / 1e9, parameters(encoders) / 1e9]
    trained = training_step(model)
    training = size_of(denoiser) + trained.peak

    models = pair_of(full_size(name))
    single, decoded = one_pass(models.late), decoding(models.late)
    text = encoding(models).flop
    there = size_of([models.late.denoiser, models.late.vae])

    def drawn(blend: Blend, flop: float, kept: float = 0.0) -> Drawn:
        made = max(costs[blend.name].peak + kept, decoded.peak)
        return Drawn((there + made) / 1e9, flop / single.flop, (flop + decoded.flop) / 1e12)

    late, region, cag = Late(), Region(asked=1.0), CAG(window=WINDOW)
    held = steps - Region().asking(steps)  # calls without a prediction for the empty prompt
    fewer = held * single.flop if models.early.predicts_twice(SCALE) else 0.0
    costs = {blend.name: drawing(models, blend) for blend in (late, region, cag)}
    call = (costs["late"].flop - text) / COUNTED
    both = (costs["region"].flop - 2 * text) / COUNTED
    guided, counted_guided = (len(c.guided_steps(n)) for c, n in ((CAG(), steps), (cag, COUNTED)))
    # the reference ends with the last guided call, as its image is not wanted
    guiding = costs["cag"].flop - 2 * text - (COUNTED + counted_guided) * call
    with torch.no_grad(), PlacesOfMasks():
        (maps,) = draw_reference(batch_of(models), [cag]).site_maps.values()
    kept = sum(m.numel() * m.element_size() for m in maps.values()) * (guided - 1)
    return Row(
        name,
        model.size,
        *counts,
        size_of(encoders) / 1e9,
        training / 1e9,
        trained.flop / 1e12,
        drawn(late, steps * call),
        drawn(region, steps * both - fewer),
        drawn(cag, (steps + guided) * call + guided * guiding, kept),
    )


def read(kept: dict[str, Any]) -> Row:
    """A row as it was saved."""
    blends = {name: Drawn(**kept[name]) for name in ("plain", "region", "cag")}
    return Row(**{**kept, **blends})


def table(rows: list[Row]) -> str:
    """In Markdown."""

    def drawn(image: Drawn) -> str:
        return f"{image.gb:.1f}, {image.passes:.0f}, {image.tflop:,.0f}"

    return markdown(
        [
            {
                "family": f"{r.name}, {r.size} px",
                "denoiser, text encoders: 10^9 weights": f"{r.denoiser:.2f}, {r.encoders:.2f}",
                "text encoders: GB": f"{r.encoders_gb:.1f}",
                "train a LoRA: GB, TFLOP a step": f"{r.training_gb:.1f}, {r.training_tflop:.0f}",
                "plain: GB, passes, TFLOP": drawn(r.plain),
                "region": drawn(r.region),
                "CAG": drawn(r.cag),
            }
            for r in rows
        ]
    )


def ratios(rows: Iterable[Row]) -> str:
    """What blends take over a plain image, in Markdown."""

    def over(blend: Drawn, plain: Drawn) -> str:
        shares = blend.gb / plain.gb, blend.passes / plain.passes, blend.tflop / plain.tflop
        return ", ".join(f"{share:.2f}" for share in shares)

    return markdown(
        [
            {
                "family": f"{r.name}, {r.size} px",
                "plain: GB, passes, TFLOP": (
                    f"{r.plain.gb:.1f}, {r.plain.passes:.0f}, {r.plain.tflop:,.0f}"
                ),
                "region, of plain: GB, passes, TFLOP": over(r.region, r.plain),
                "CAG": over(r.cag, r.plain),
            }
            for r in rows
        ]
    )


def rows_of(names: Iterable[str], steps: int, out: Path) -> list[Row]:
    """The rows of families, counted where they are not in `out` yet."""
    file = out / f"counted-{steps}.json"
    known = {r["name"]: r for r in json.loads(file.read_text())} if file.exists() else {}
    for name in tqdm([name for name in names if name not in known], desc="families"):
        known[name] = asdict(row(name, steps))
        save_text(json.dumps(list(known.values()), indent=1) + "\n", file)
    return [read(known[name]) for name in names]


@entry
def main() -> None:
    asked = parser(__doc__, OUT, sampling=28)
    asked.add_argument("--families", nargs="+", default=list(FULL_SIZE), choices=list(FULL_SIZE))
    args = asked.parse_args()
    page, rows = args.out / "counted.md", rows_of(args.families, args.sampling, args.out)
    save_text(table(rows) + "\n", page)
    print(f"{table(rows)}\nthe table is in {page}")


if __name__ == "__main__":
    main()

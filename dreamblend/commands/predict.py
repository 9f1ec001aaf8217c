"""`predict`: blend two snapshots of a run. `select` picks them if none are named."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch.cli import LightningArgumentParser, instantiate_class
from lightning.pytorch.utilities import rank_zero_only

from dreamblend.blending.data import PromptData
from dreamblend.blending.module import Blender
from dreamblend.blending.options import Options, check_size
from dreamblend.blending.prompts import check_prompts, named
from dreamblend.callbacks.writer import BlendWriter
from dreamblend.commands.command import Command
from dreamblend.errors import InputError
from dreamblend.selection.command import auto_pair, introduce
from dreamblend.selection.probes import DRAWN
from dreamblend.storage.files import check_writable
from dreamblend.storage.runs import open_run
from dreamblend.trainer import callbacks

# what Blender takes, and the files of a run may say
RECORDED = (
    *("base", "base_config", "base_prediction", "revision", "variant"),
    *("identifier", "class_noun"),
)


class BlendCLI(Command):
    """The command line of `predict`."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """`predict`, without the options that a blend never uses: a Lightning checkpoint, and
        keeping all images in memory.
        """
        return {
            "predict": {
                "model",
                "dataloaders",
                "datamodule",
                "ckpt_path",
                "weights_only",
                "return_predictions",
            }
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--run",
            type=Path | None,
            default=None,
            help=(
                "folder of a train.py run, or of another trainer's checkpoints; --early and --late"
                " name its steps"
            ),
        )
        parser.add_argument(
            "--early",
            type=str,
            default="auto",
            help="the underfit snapshot: a step of the run, a path, or auto, the pick of `select`",
        )
        parser.add_argument(
            "--late", type=str, default="auto", help="the overfit snapshot: likewise"
        )
        parser.add_argument(
            "--prompts",
            type=list[str] | str,
            required=True,
            help="a text file with one prompt per line, or the prompts",
        )
        parser.add_argument("--seeds", type=str, default="0-3", help="such as 0-3 or 0,5,7-9")
        parser.add_argument(
            "--reference",
            type=Path | None,
            default=None,
            help="a photo or any image whose layout CAG follows",
        )
        parser.add_argument(
            "--out",
            type=Path,
            default=Path("runs/blend"),
            help="folder of the images, results.jsonl and report.html",
        )
        for name in ("run", "early", "late", "reference"):
            parser.link_arguments(name, f"model.{name}")
        for name in ("prompts", "seeds"):
            parser.link_arguments(name, f"data.{name}")
        parser.link_arguments("out", "trainer.default_root_dir", compute_fn=str)

    def before_instantiate_classes(self) -> None:
        config = self.config.predict
        model, run = config.model, config.run
        if run is not None and not (run / "snapshots").is_dir():
            run = open_run(run, **{name: model[name] for name in RECORDED})
            if run.other is not None:
                introduce(run)
                run.demand("base", "identifier", "class_noun", option="--model.")
                for name in RECORDED:
                    model[name] = getattr(run, name)
        if "auto" in (config.early, config.late):
            check_size(model.height, model.width)
            blend = instantiate_class((), model.blend.as_dict())
            pair = auto_pair(
                run,
                config.early,
                config.late,
                blend,
                model.guidance_scale,
                model.num_inference_steps,
                model.grid,
                model.quantize,
                height=model.height,
                width=model.width,
                attention_layers=model.attention_layers,
                offload=model.offload,
                options=Options(**{name: model[name] for name in (*DRAWN, "vae")}),
                revision=model.revision,
                variant=model.variant,
                safety_checker=model.safety_checker,
            )
            config.early, config.late = model.early, model.late = pair

    def before_predict(self) -> None:
        if self.trainer.predict_loop.inference_mode:
            raise InputError("guidance needs gradients: set trainer.inference_mode to false")
        check_writable(Path(self.trainer.default_root_dir))
        pairs = self.datamodule.all_pairs(
            self.model.identifier, self.model.class_noun, self.model.options.prompt_weighting
        )
        self.model.load()
        rank_zero_only(check_prompts)(
            list(dict.fromkeys(p for p, _ in pairs)),
            self.model.models.late,
            self.model.identifier,
            self.model.class_noun,
        )
        called = callbacks(self.trainer)
        if not any(isinstance(c, BlendWriter) for c in called):
            called.append(BlendWriter())
        # the writer comes first, as the others read what all processes have written
        called.sort(key=lambda c: not isinstance(c, BlendWriter))
        (self.writer,) = [c for c in called if isinstance(c, BlendWriter)]

    def after_predict(self) -> None:
        out = Path(self.trainer.default_root_dir)
        if not self.trainer.is_global_zero:
            return
        pairs, flagged = self.datamodule.pairs, self.writer.flagged
        undrawn = self.writer.undrawn(out, self.model, pairs)
        said = []
        if lacking := [pair for pair in undrawn if pair not in flagged]:
            said.append(
                f"{len(lacking)} of {len(pairs)} pairs gave NaN or infinite images and are left out"
                f" of {out} ({named(lacking)}): blend snapshots that were trained less far, or"
                " lower model.guidance_scale"
            )
        if flagged:
            said.append(
                f"{len(flagged)} of {len(pairs)} pairs gave images that the base's safety checker"
                f" takes for unsafe, which are left out of {out} ({named(flagged)}): draw other"
                " seeds or prompts, or set model.safety_checker to false where it is mistaken"
            )
        if said:
            raise InputError("; and ".join(said))


def main() -> None:
    """Run it."""
    BlendCLI(
        Blender,
        PromptData,
        seed_everything_default=0,
        save_config_callback=None,
        trainer_defaults={"inference_mode": False},
        parser_kwargs={"description": __doc__},
    )

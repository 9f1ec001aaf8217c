"""The recipe that makes the sandbox's weights: `python -m dreamblend.sandbox.making.recipe`.

scenes -> judges                 (parts, prompt, subject: trained apart from the bases)
       -> autoencoder
       -> tokenizer -> latents -> base   (denoiser + text encoder, a Stable Diffusion folder)
                               -> dit    (joint attention, a Stable Diffusion 3 folder)

What --out has is not made again. A stage goes on from its last checkpoint in --scratch. Stages that
are named run alone, with what they need.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file

from dreamblend.sandbox.making.autoencoder import fit_autoencoder
from dreamblend.sandbox.making.base import fit_base
from dreamblend.sandbox.making.data import load_scenes, make_tokenizer
from dreamblend.sandbox.making.dit import fit_dit
from dreamblend.sandbox.making.fitting import Run, save
from dreamblend.sandbox.making.judges import fit_parts_judge, fit_prompt_judge, fit_subject_judge

WEIGHTS = Path(__file__).parents[1] / "weights"
JUDGES = {"parts": fit_parts_judge, "prompt": fit_prompt_judge, "subject": fit_subject_judge}
STEPS = {  # of each stage that trains
    "parts": 1800,
    "prompt": 6000,
    "subject": 2600,
    "autoencoder": 4000,
    "base": 11000,
    "dit": 14000,
}
STAGES = (*JUDGES, "autoencoder", "scenes", "base", "dit")


def main() -> None:
    """Make what is missing of the sandbox's weights."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)}")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="where the weights go")
    parser.add_argument(
        "--scratch",
        type=Path,
        default=Path("runs/sandbox-weights"),
        help="where interrupted stages are kept",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="threads of the CPU")
    parser.add_argument("--workers", type=int, default=0, help="processes that draw scenes")
    parser.add_argument("--scenes", type=int, default=65536, help="scenes the bases are trained on")
    parser.add_argument("--share", type=float, default=1.0, help="of each stage's steps, to try it")
    args = parser.parse_args()
    if unknown := set(args.stages) - set(STAGES):
        parser.error(f"no such stage: {', '.join(sorted(unknown))}")
    if args.threads:
        torch.set_num_threads(args.threads)
    stages = args.stages or STAGES
    steps = {stage: max(1, round(n * args.share)) for stage, n in STEPS.items()}
    run = Run(args.scratch, args.device, args.workers)

    for name in JUDGES:
        path = args.out / "judges" / f"{name}.safetensors"
        if name in stages and not path.exists():
            torch.manual_seed(0)  # a judge does not depend on what was made before it
            judge = JUDGES[name](steps[name], run)
            save({k: v.half() for k, v in judge.state_dict().items()}, path)
    if not {"autoencoder", "scenes", "base", "dit"} & set(stages):
        return
    folder = args.out / "base" / "vae"
    if not folder.exists():
        torch.manual_seed(0)
        # type checkers see the stand-in that diffusers has where torch is missing
        made: Any = fit_autoencoder(steps["autoencoder"], run)
        made.half().save_pretrained(folder)
    if not {"scenes", "base", "dit"} & set(stages):
        return
    # from_pretrained would write the folder's path into the bases
    vae: Any = AutoencoderKL.from_config(AutoencoderKL.load_config(folder)).to(run.device)
    vae.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"))
    tokenizer = make_tokenizer()
    data = load_scenes(args.scenes, vae, tokenizer, run)
    for name, fit in (("base", fit_base), ("dit", fit_dit)):
        if name in stages and not (args.out / name / "model_index.json").exists():
            torch.manual_seed(0)
            fit(steps[name], data, vae, tokenizer, args.out / name, run)
    copy = args.out / "dit" / "vae"
    if copy.exists() and not copy.is_symlink():  # one autoencoder serves both
        shutil.rmtree(copy)
        copy.symlink_to(Path("..") / "base" / "vae")


if __name__ == "__main__":
    main()

"""The Python of docs/python.md runs as it stands, from its first block to its last, with fewer
steps.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import save_file

from dreamblend.models import load_backbone
from dreamblend.tuning import LoRA

PAGE = Path(__file__).resolve().parents[2] / "docs" / "python.md"


def save_lora(file: Path, size: float) -> None:
    """A LoRA of the sandbox, as diffusers saves one."""
    model, tuning = load_backbone("sandbox"), LoRA(rank=1)
    tuning.attach(model)
    ((_, weights),) = tuning.export(model).items()
    tensors = {k: size * torch.randn(v.shape) for k, v in weights.tensors.items()}
    save_file(tensors, file, metadata=weights.metadata)


def test_the_blocks_run_one_after_another(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, size in (("early", 0.01), ("late", 0.05)):
        save_lora(tmp_path / f"{name}.safetensors", size)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    names: dict = {}
    for block in blocks:
        exec(re.sub(r"num_inference_steps=\d+", "num_inference_steps=2", block), names)
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said[:3]] == ["sks", "mug", "beach"]
    assert (tmp_path / "beach-0.png").is_file() and (tmp_path / "beach-0-late.png").is_file()
    assert len(names["maps"]) > 1 and names["image"].size == names["plain"].size
    assert names["image"].tobytes() != names["plain"].tobytes()

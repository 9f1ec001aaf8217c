"""The runs of other trainers: recognised by their names, ordered, and asked for what they lack."""

from __future__ import annotations

import shutil

import foreign_runs
import pytest
import torch
from foreign_runs import some
from safetensors.torch import save_file
from tiny_runs import plain_pipeline

from dreamblend.errors import InputError
from dreamblend.storage import snapshots, trainer_files, trainers
from dreamblend.storage.runs import open_run

BASE = "owner/base"


def steps(folder) -> list[int]:
    return [step for step, _ in snapshots.find(folder)]


WRITERS = {
    trainers.KOHYA: lambda f, loras, photos: foreign_runs.kohya(f, loras, base=BASE),
    trainers.AI_TOOLKIT: lambda f, loras, photos: foreign_runs.ai_toolkit(f, loras, BASE, photos),
    trainers.ONE_TRAINER: lambda f, loras, photos: foreign_runs.one_trainer(f, loras, BASE, photos),
    trainers.SIMPLE_TUNER: lambda f, loras, photos: foreign_runs.simple_tuner(
        f, loras, BASE, photos
    ),
    trainers.DIFFUSION_PIPE: lambda f, loras, photos: foreign_runs.diffusion_pipe(
        f, loras, BASE, photos
    ),
    trainers.DIFFUSERS: lambda f, loras, photos: foreign_runs.diffusers_lora(
        f, loras, BASE, photos
    ),
}
NUMBERS = {
    trainers.KOHYA: [30, 60, 90],
    trainers.AI_TOOLKIT: [250, 500, 750],
    trainers.ONE_TRAINER: [100, 200, 300],
    trainers.SIMPLE_TUNER: [500, 1000, 1500],
    trainers.DIFFUSION_PIPE: [1, 2, 3],  # epochs, as no file says their steps
    trainers.DIFFUSERS: [500, 1000, 1500],
}


@pytest.mark.parametrize("trainer", WRITERS)
def test_a_run_is_recognised_and_ordered_and_says_what_its_files_say(trainer, tmp_path, mug_photos):
    folder = WRITERS[trainer](tmp_path / "run", some(3), mug_photos)
    run = open_run(folder)
    assert run.other is not None and run.other.trainer == trainer and not run.other.notes
    assert list(run.snapshots) == NUMBERS[trainer] and run.method == "lora"
    assert run.unit == ("epoch" if trainer == trainers.DIFFUSION_PIPE else "step")
    assert f"a run of {trainer}, 3 checkpoints" in str(run.other)
    assert run.base == BASE
    if trainer not in (trainers.ONE_TRAINER, trainers.DIFFUSION_PIPE):  # which have captions
        assert (run.identifier, run.class_noun) == ("sks", "mug")
    if trainer != trainers.KOHYA:  # of the folder of the photos it keeps the name alone
        assert run.photos == mug_photos
    assert len({s.weights for s in run.snapshots.values()}) == 3


def test_musubi_is_asked_for_all_of_its_subject(tmp_path):
    run = open_run(foreign_runs.musubi(tmp_path, some(3)))
    assert list(run.snapshots) == [30, 60, 90]
    with pytest.raises(InputError) as error:
        run.demand("base", "identifier", "class_noun", "photos")
    said = str(error.value)
    for option in ("--base", "--identifier", "--class_noun", "--photos", "qwen_image_bf16"):
        assert option in said
    told = open_run(tmp_path, base="b/c", identifier="sks", class_noun="mug", photos=tmp_path)
    told.demand("base", "identifier", "class_noun", "photos")
    with pytest.raises(InputError, match=r"--model\.identifier and --model\.class_noun"):
        open_run(tmp_path, base="b/c").demand("base", "identifier", "class_noun", option="--model.")


def test_a_full_run_of_diffusers_ends_in_its_pipeline(tiny_base, tmp_path, mug_photos):
    pipe = plain_pipeline(tiny_base)
    folder = foreign_runs.diffusers_full(tmp_path, pipe, [10, 20, 30], str(tiny_base), mug_photos)
    run = open_run(folder)
    assert list(run.snapshots) == [10, 20, 30] and run.method == "full"
    assert run.base == str(tiny_base) and snapshots.resolve(folder, "30") == folder
    before = run.snapshots[30].weights
    (folder / "pair.json").write_text("{}")  # results beside it are none of its weights
    assert open_run(folder).snapshots[30].weights == before


def test_epochs_without_steps_are_an_order_and_the_last_is_called_the_next(tmp_path):
    folder = foreign_runs.kohya(tmp_path, some(4), metadata=False)
    run = trainers.recognise(folder)
    assert run is not None and run.unit == "epoch"
    assert [n for n, _ in run.checkpoints] == [1, 2, 3, 4]
    assert run.checkpoints[-1][1].name == "mug.safetensors" and "epoch 4" in run.notes[0]
    with pytest.raises(InputError, match="it has 1, 2, 3, 4"):
        snapshots.resolve(folder, "90")


def test_epochs_and_steps_of_one_run_are_ordered_by_what_the_files_say(tmp_path):
    foreign_runs.kohya(tmp_path, some(3))
    foreign_runs.kohya(tmp_path, some(3), steps_an_epoch=45, by_steps=True)
    assert steps(tmp_path) == [30, 45, 60, 90, 135]
    for file, tensors in zip(tmp_path.glob("*.safetensors"), some(5)):
        save_file(tensors, file)
    run = trainers.recognise(tmp_path)
    assert run is not None and any("is left out" in note for note in run.notes)
    assert len(run.checkpoints) == 3  # two of one kind, and the last


def test_names_of_two_runs_are_asked_for(tmp_path):
    foreign_runs.kohya(tmp_path, some(2), "mug")
    foreign_runs.kohya(tmp_path, some(3), "cat")
    with pytest.raises(InputError, match="several runs.*cat or .*mug"):
        snapshots.find(tmp_path)
    assert steps(tmp_path / "mug") == [30, 60] and steps(tmp_path / "cat") == [30, 60, 90]
    assert steps(tmp_path / "cat.safetensors") == [30, 60, 90]
    assert open_run(tmp_path / "cat").results != open_run(tmp_path / "mug").results


def test_two_runs_of_one_trainer_in_folders_of_their_own_are_asked_for(tmp_path, mug_photos):
    out = foreign_runs.diffusion_pipe(tmp_path / "out", some(2), BASE, mug_photos)
    shutil.copytree(out / "20260131_10-00-00", out / "20260201_10-00-00")
    with pytest.raises(InputError, match="several runs .*20260201"):
        snapshots.find(out)
    assert steps(out / "20260201_10-00-00") == [1, 2]


def test_steps_that_begin_anew_are_two_runs(tmp_path, mug_photos):
    save = foreign_runs.one_trainer(tmp_path, some(3), BASE, mug_photos) / "save"
    save_file(some(1)[0], save / "mug2026-02-01_10-00-00-save-100-1-0.safetensors")
    with pytest.raises(InputError, match="several runs, as steps begin anew after 300"):
        snapshots.find(tmp_path)


def test_what_cannot_be_read_is_left_out_by_name(tmp_path):
    folder = foreign_runs.kohya(tmp_path, some(3))
    torch.save({}, folder / "mug-000009.pt")
    (folder / "mug-000008.safetensors").write_bytes(b"broken")
    run = trainers.recognise(folder)
    assert run is not None and [n for n, _ in run.checkpoints] == [30, 60, 90]
    assert "mug-000008" in " ".join(run.notes) and "pickle" in " ".join(run.notes)


@pytest.mark.parametrize(
    "text, subject",
    [
        ("a photo of sks dog", ("sks", "dog")),
        ("photo of a TOK", ("TOK", None)),
        ("sks coffee mug", ("sks", "coffee mug")),
        ("a long caption that is of everything and nothing at all", (None, None)),
    ],
)
def test_a_prompt_names_its_subject_where_that_is_clear(text, subject):
    assert trainer_files._subject(text) == subject


@pytest.mark.parametrize("name", ["README.md", "config.yaml", "pair.json"])
def test_settings_that_are_damaged_say_nothing(name, tmp_path, mug_photos):
    folder = foreign_runs.ai_toolkit(tmp_path / "run", some(2), BASE, mug_photos)
    (folder / name).write_bytes(b"---\n{[\xff")
    assert steps(folder) == [250, 500]

"""Hostile and wrong input: one table of what each case gets. No case runs code, takes much memory,
or waits.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import resource
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as fuzzing
from hypothesis import strategies as st
from PIL import Image
from report_pages import Page, draw_folder
from safetensors.torch import save_file
from snapshot_folders import FILES, edit, write

from dreamblend.blending.prompts import read_prompts
from dreamblend.errors import InputError
from dreamblend.models import load_backbone, locate_base
from dreamblend.report import write_report
from dreamblend.storage import snapshots
from dreamblend.storage.blend_folder import CHUNK, read_index, slug
from dreamblend.storage.files import save_png
from dreamblend.storage.foreign import LORA
from dreamblend.storage.snapshots import ABOUT
from dreamblend.training.data import SubjectData
from dreamblend.tuning import restore

MEMORY = 2**30  # bytes that a case may take
TEXT = "<script>alert(1)</script><img src=x onerror=y>\"'&"


@dataclass(frozen=True)
class Gets:
    """What a case gets: refused with words, or accepted, which `how` checks on what came out."""

    words: str = ""
    how: Callable[[Any], bool] | None = None


def refused(words):
    return Gets(words)


def accepted(words, how):
    return Gets(words, how)  # the words are for who reads the table


# ------------------------------------------------------------------------------------- what is made
class Bomb:
    """A pickle that leaves a mark where it is read."""

    def __init__(self, tmp: Path):
        self.mark = tmp / "exploded"

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def pickled(tmp: Path, name: str, zipped: bool = False) -> Path:
    path = tmp / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if zipped:
        torch.save({"lora": Bomb(tmp)}, path)
    else:
        path.write_bytes(pickle.dumps({"lora": Bomb(tmp)}))
    return path


def tensors(tmp: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    """A .safetensors file with a header of one's own, and a length that it may lie about."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (tmp / "x.safetensors").write_bytes(
        struct.pack("<Q", len(text) if length is None else length) + text + data
    )
    return tmp / "x.safetensors"


def entry(shape: list[int], end: int, dtype: str = "F32", start: int = 0) -> dict:
    return {"lora_A.weight": {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}}


def sparse(tmp: Path) -> Path:
    """A header of 150 MB in a file of as many, which takes no place on the disk."""
    path = tensors(tmp, b"{", length=150 * 10**6)
    os.truncate(path, 160 * 10**6)
    return path


def snapshot(
    tmp: Path, change: Callable[[Path], object] = lambda path: None, **about: object
) -> Path:
    path = write(tmp / "snapshots", **about)
    change(path)
    return path


def listing(name: str) -> Callable[[Path], None]:
    return lambda path: edit(path, files={name: {"sha256": "0" * 64, "bytes": 1}})


def linked(path: Path) -> None:
    (path / "unet/config.json").unlink()
    (path / "unet/config.json").symlink_to("/etc/hostname")


def about(text: str | bytes) -> Callable[[Path], object]:
    return lambda path: (path / ABOUT).write_bytes(text.encode() if isinstance(text, str) else text)


def base(tmp: Path, name: str, **changes: object) -> str:
    """The tiny base, with other entries in one of its configurations, and code beside it that
    leaves a mark.
    """
    folder = Path(shutil.copytree(BASE["folder"], tmp / "base"))
    for place in (folder, folder / "unet", folder / "scheduler"):
        (place / "evil.py").write_text(f"open({str(tmp / 'exploded')!r}, 'w')\nclass Evil: pass\n")
    said = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**said, **changes}))
    return str(folder)


BASE: dict[str, Path] = {}  # filled by a fixture


def pickles_only(tmp: Path) -> str:
    folder = Path(base(tmp, "model_index.json"))
    (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
    pickled(tmp, "base/unet/diffusion_pytorch_model.bin")
    return str(folder)


def tuned(tmp: Path, **changes: object) -> None:
    """A snapshot of every weight whose configuration says more than weights and settings, put into
    its base.
    """
    folder = Path(base(tmp, "unet/config.json", **changes))
    restore(snapshots.read(folder), load_backbone(str(BASE["folder"])), "x")


def png(width: int, height: int, data: bytes = b"") -> bytes:
    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(data))
        + chunk(b"IEND", b"")
    )


def photo(tmp: Path, name: str, content: bytes | Callable[[Path], object]) -> torch.Tensor:
    """Pixels (n, 3, 8, 8) of a folder with this one photo."""
    folder = tmp / "photos"
    folder.mkdir()
    (folder / name).write_bytes(content) if isinstance(content, bytes) else content(folder / name)
    data = SubjectData(folder, "mug")
    data.check()
    return torch.cat(list(data.instance_pixels(8)))


def animated(path: Path) -> None:
    frames = [Image.new("RGB", (9, 9), colour) for colour in ("lime", "red", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def crowd(tmp: Path) -> int:
    folder = tmp / "photos"
    folder.mkdir()
    Image.new("RGB", (4, 4)).save(folder / "0.png")
    for i in range(1, 10_000):
        os.link(folder / "0.png", folder / f"{i}.png")
    data = SubjectData(folder, "mug")
    data.check()
    return len(data.photos)


def is_name(name: str) -> bool:
    return re.fullmatch(r"[a-z0-9-]{1,80}", name) is not None


def names(*prompts: str) -> list[str]:
    return [slug(p) for prompt in prompts for p in read_prompts([prompt], "sks", "mug")]


def distinct(found: list[str]) -> bool:
    return all(map(is_name, found)) and len(set(found)) == len(found)


def page(tmp: Path) -> Page:
    """A report of which every text is markup."""
    out = draw_folder(tmp, seeds=1, prompts=[TEXT])
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    extra = {
        "early": TEXT,
        "late": TEXT,
        "settings": {TEXT: TEXT},
        "collapse": {TEXT: 0.5},
        "scores": {TEXT: 1.0},
        "sha256": TEXT,
    }
    lines = [{**line, **extra, "kind": line["kind"].replace("cag", TEXT)} for line in lines]
    (out / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, said in {
        "run": {
            "identifier": TEXT,
            "class_noun": TEXT,
            TEXT: TEXT,
            "settings": {TEXT: [TEXT]},
            "photos": [TEXT],
        },
        "summary": {"rows": [{"kind": TEXT, TEXT: 1.0}], "judges": TEXT, "note": TEXT},
        "collapse": {
            "measures": [TEXT],
            "snapshots": [{"name": TEXT, "step": 1, TEXT: 0.5}],
            "note": TEXT,
        },
    }.items():
        (out / f"{name}.json").write_text(json.dumps(said))
    return Page(write_report(out))


def report_line(tmp: Path, **said: object) -> Page:
    out = draw_folder(tmp / "out", seeds=1, prompts=["a sks mug"])
    with open(out / "results.jsonl", "a") as index:
        index.write(
            json.dumps({"prompt": "x", "seed": 1, "kind": "late", "file": "x.png", **said}) + "\n"
        )
    return Page(write_report(out))


# ---------------------------------------------------------------------------------------- the table
damaged = refused("is not a readable safetensors file")
no_model = refused("a size that no model has")


def ours(change=lambda path: None, **about):
    return lambda tmp: snapshots.read(snapshot(tmp, change, **about))


def weights(*of):
    return lambda tmp: snapshots.read(tensors(tmp, *of))


def model(name, **changes):
    return lambda tmp: load_backbone(base(tmp, name, **changes))


def shot(name, content):
    return lambda tmp: photo(tmp, name, content)


def named(*prompts):
    return lambda tmp: names(*prompts)


CASES: dict[str, tuple[Callable[[Path], Any], Gets]] = {
    # checkpoints made elsewhere
    **{
        f"a pickle, {name}": (
            lambda tmp, name=name: snapshots.read(pickled(tmp, name)),
            refused("is a pickle.*convert it first.*save_pretrained"),
        )
        for name in ("model.ckpt", "lora.bin", "lora.pt", "lora.pth", "MODEL.CKPT")
    },
    "a pickle with a safetensors name": (
        lambda tmp: snapshots.read(pickled(tmp, "lora.safetensors")),
        damaged,
    ),
    "a zipped pickle with a safetensors name": (
        lambda tmp: snapshots.read(pickled(tmp, "lora.safetensors", True)),
        damaged,
    ),
    "a pickle in a LoRA folder": (
        lambda tmp: snapshots.read(pickled(tmp, f"lora/{LORA}").parent),
        damaged,
    ),
    "a header that is longer than the file": (weights({}, b"", 10**6), damaged),
    "a header of an exabyte": (weights({}, b"", 2**60), damaged),
    "a header of 150 MB": (lambda tmp: snapshots.read(sparse(tmp)), damaged),
    "a header that is no JSON": (weights(b"{{{{"), damaged),
    "a shape beyond the data": (weights(entry([10**6], 4 * 10**6), b"1234"), damaged),
    "a shape beyond all numbers": (weights(entry([2**40, 2**40], 4), b"1234"), damaged),
    "a shape below zero": (weights(entry([-1], 4), b"1234"), damaged),
    "an unknown dtype": (weights(entry([1], 4, "F999"), b"1234"), damaged),
    "tensors with a gap before them": (weights(entry([1], 8, start=4), b"12345678"), damaged),
    "weights of nothing known": (
        lambda tmp: (
            save_file({"w": torch.zeros(1)}, tmp / "w.safetensors")
            or snapshots.read(tmp / "w.safetensors")
        ),
        refused("is no snapshot"),
    ),
    # snapshots of ours
    "a snapshot as it was written": (
        ours(),
        accepted("as it is", lambda read: read.method == "full"),
    ),
    "a link in a snapshot": (
        ours(linked),
        refused("config.json is a link.*not a file of the snapshot"),
    ),
    "a link to itself": (
        ours(lambda path: (path / "unet/x").symlink_to(path / "unet")),
        refused("unet/x is a link"),
    ),
    "a pipe in a snapshot": (
        ours(lambda path: os.mkfifo(path / "pipe")),
        refused("pipe is a link or a device"),
    ),
    "a listed file above the folder": (
        ours(listing("../step-000005/unet/config.json")),
        refused("not a file of the snapshot"),
    ),
    "a listed file from the root": (
        ours(listing("/etc/hostname")),
        refused("not a file of the snapshot"),
    ),
    "a listed file with a zero byte": (ours(listing("a\0b")), refused("is missing")),
    "a listed file with a name of 5,000": (ours(listing("a" * 5000)), refused("is missing")),
    "a listed file without a name": (ours(listing("")), refused("not a file of the snapshot")),
    "a file that is not listed": (
        ours(lambda path: pickled(path, "unet/weights.bin")),
        refused("unet/weights.bin is no file of the snapshot"),
    ),
    "a snapshot.json of 20 MB": (
        ours(about(" " * 20 * 10**6)),
        refused("snapshot.json is damaged"),
    ),
    "a snapshot.json 100,000 deep": (ours(about("[" * 10**5)), refused("snapshot.json is damaged")),
    "a number of 10,000 digits": (
        ours(about('{"format": ' + "1" * 10**4 + "}")),
        refused("snapshot.json is damaged"),
    ),
    "an entry given twice": (
        ours(lambda p: about((p / ABOUT).read_text().replace("{", '{"step": 9, ', 1))(p)),
        refused("snapshot.json is damaged"),
    ),
    "a method that is not known": (
        lambda tmp: restore(snapshots.read(snapshot(tmp, method="os.system")), None, "x"),
        refused("method 'os.system'.*does not know"),
    ),
    "a configuration with code of its own": (
        lambda tmp: tuned(tmp, auto_map={"AutoModel": "evil.Evil"}),
        refused("code of its own"),
    ),
    "a denoiser with a billion channels": (
        lambda tmp: tuned(tmp, block_out_channels=[10**9, 10**9]),
        no_model,
    ),
    # bases
    **{
        f"a base that is a pickle, {name}": (
            lambda tmp, name=name: locate_base(str(pickled(tmp, name))),
            refused("is a pickle.*convert it"),
        )
        for name in ("model.ckpt", "model.pt", "MODEL.BIN")
    },
    "a base that is a pickle with a safetensors name": (
        lambda tmp: locate_base(str(pickled(tmp, "model.safetensors"))),
        refused("is damaged"),
    ),
    "a base of nothing but pickles": (
        lambda tmp: locate_base(pickles_only(tmp)),
        refused("only pickled weights"),
    ),
    "a base of a custom pipeline": (
        model("model_index.json", _class_name=["evil", "Evil"]),
        refused("families that can be loaded"),
    ),
    "a base whose index runs code": (
        model("model_index.json", custom_pipeline="evil"),
        refused("code of its own to be run .custom_pipeline"),
    ),
    "a base that trusts itself": (
        model("model_index.json", trust_remote_code=True),
        refused("code of its own to be run"),
    ),
    "a base with a scheduler from a file": (
        model("model_index.json", scheduler=["evil", "Evil"]),
        refused("scheduler is of 'evil', which is code"),
    ),
    "a base with a tokenizer from Python": (
        model("model_index.json", tokenizer=["subprocess", "Popen"]),
        refused("tokenizer is of 'subprocess'"),
    ),
    "a base with an auto_map": (
        model("text_encoder/config.json", auto_map={"AutoModel": "evil.Evil"}),
        refused("code of its own to be run .auto_map"),
    ),
    "a base with a vast picture": (model("unet/config.json", sample_size=10**6), no_model),
    "a base with a trillion timesteps": (
        model("scheduler/scheduler_config.json", num_train_timesteps=10**12),
        no_model,
    ),
    "a base of infinite layers": (
        model("vae/config.json", layers_per_block=float("inf")),
        no_model,
    ),
    "a base with code lying in it": (
        model("model_index.json"),
        accepted("without reading the code", lambda model: model.size == 32),
    ),
    # photos
    "a photo of 60,000 x 60,000 in a few bytes": (
        shot("x.png", png(60_000, 60_000)),
        refused("too many pixels"),
    ),
    "a photo whose pixels are not there": (
        shot("x.png", png(4000, 4000)),
        refused("x.png cannot be read as a photo"),
    ),
    "a photo of 0 x 0": (shot("x.png", png(0, 0)), refused("x.png cannot be read as a photo")),
    "an empty photo": (
        shot("x.jpg", b""),
        refused("x.jpg cannot be read as a photo .the file is empty"),
    ),
    "a photo that is text": (shot("x.jpg", b"a mug"), refused("it is not an image")),
    "a photo that is a program for a printer": (
        shot("x.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"),
        refused("not an image"),
    ),
    "a photo that is a page": (
        shot("x.png", b"<svg xmlns='http://www.w3.org/2000/svg'><script>x</script></svg>"),
        refused("not an image"),
    ),
    "a photo that is a pipe": (shot("x.png", os.mkfifo), refused("holds no images")),
    "a photo that is a folder": (shot("x.png", Path.mkdir), refused("holds no images")),
    "a photo that is a link to itself": (
        shot("x.png", lambda path: path.symlink_to(path)),
        refused("holds no images"),
    ),
    "a photo that moves": (
        shot("x.gif", animated),
        accepted("its first frame", lambda x: x[0, :, 4, 4].tolist() == [-1, 1, -1]),
    ),
    "a photo of 1 x 1": (
        shot("x.png", png(1, 1, b"\0\xff\0\0")),
        accepted("enlarged", lambda x: x.shape == (1, 3, 8, 8)),
    ),
    "a folder of 10,000 photos": (crowd, accepted("all of them", lambda n: n == 10_000)),
    # prompts
    "prompts that are paths": (
        named("a ../../etc/passwd", "a /etc/passwd", "a ..\\..\\x", "~ root", ". .", ".. .."),
        accepted("as names", distinct),
    ),
    "prompts with control characters": (
        named("a\0b c", "a\x1b[2J c", "a\x07 c", "a\x7f c", "a c"),
        accepted("as names", distinct),
    ),
    "prompts from right to left": (
        named("a \u202egpj.exe", "כוס על החוף", "a \u2066gpj.exe", "كوب"),
        accepted("as names", distinct),
    ),
    "prompts of 10,000 characters": (
        named("a " + "x" * 10_000, "a " + "x" * 9_999 + "y", "é" * 10_000),
        accepted("as short names", distinct),
    ),
    "prompts that differ in case or form": (
        named("É x", "é x", "E\u0301 x", "A x", "a x"),
        accepted("as five names", distinct),
    ),
    "prompts that Windows keeps for itself": (
        named("CON", "nul", "aux", "a:b c"),
        accepted("as names", distinct),
    ),
    "a prompt that is a path of 10,000": (
        named("/" + "x" * 10_000),
        refused("the prompt file .* does not exist"),
    ),
    "a prompt file with a zero byte": (named("a\0.txt"), refused("does not exist")),
    "a prompt file without an end": (named("/dev/zero"), refused("does not exist")),
    # the report
    "a report of markup": (
        page,
        accepted(
            "as text",
            lambda p: (
                TEXT in p.inside("h3")
                and all(tag != "script" and "onerror" not in said for tag, said in p.tags)
            ),
        ),
    ),
    "a report of images outside": (
        lambda tmp: report_line(tmp, file="../../../../etc/hostname"),
        accepted("without them", lambda p: "hostname" not in p.html),
    ),
    "a report of a name with a zero byte": (
        lambda tmp: report_line(tmp, file="a\0b.png"),
        accepted("as missing", lambda p: "missing or damaged" in p.html),
    ),
}


@contextmanager
def little_memory() -> Iterator[None]:
    limit = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limit)


@pytest.fixture(autouse=True, scope="module")
def _base(tiny_base):
    BASE["folder"] = tiny_base


def test_the_table_is_long_enough():
    assert len(CASES) >= 40 and FILES


@pytest.mark.filterwarnings("ignore:.*has only 1 x 1 pixels")
@pytest.mark.parametrize("case", CASES)
def test_hostile_input(case, tmp_path):
    act, gets = CASES[case]
    with little_memory():
        if gets.how is None:
            with pytest.raises(InputError, match=gets.words) as error:
                act(tmp_path)
            assert len(str(error.value).splitlines()) == 1
        else:
            assert gets.how(act(tmp_path)), gets.words
    assert not (tmp_path / "exploded").exists()


def test_the_bomb_is_one(tmp_path):
    pickle.loads(pickled(tmp_path, "x").read_bytes())
    assert (tmp_path / "exploded").exists()


# ------------------------------------------------------------------------------------------ fuzzing
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(max_size=9), v, max_size=4),
    max_leaves=12,
)
of_a_snapshot = st.dictionaries(
    st.sampled_from([*snapshots.About.__dataclass_fields__, "other"]), json_values, max_size=6
)
LINE = [
    "prompt",
    "seed",
    "kind",
    "file",
    "sha256",
    "early",
    "settings",
    "collapse",
    "distance",
    "scores",
]
of_a_line = st.dictionaries(st.sampled_from(LINE), json_values, max_size=10)
often = fuzzing(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    database=None,
)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("fuzz"))


@often
@given(said=of_a_snapshot)
def test_any_snapshot_json_is_read_or_refused(fuzzed, said):
    """One that fits its digest, as whoever makes it by hand can write it."""
    before = (fuzzed / ABOUT).read_bytes()
    try:
        edit(fuzzed, **said)
        try:
            read = snapshots.read(fuzzed)
            assert set(read.about.files) == set(FILES) and isinstance(read.name, str)
        except InputError as error:
            assert str(fuzzed) in str(error)
    finally:
        (fuzzed / ABOUT).write_bytes(before)


@often
@given(data=st.binary(max_size=200), place=st.integers(0, 10**6))
def test_any_bytes_in_a_snapshot_json_are_refused(fuzzed, data, place):
    before = (fuzzed / ABOUT).read_bytes()
    place %= len(before)
    changed = before[:place] + data + before[place + len(data) :]
    try:
        (fuzzed / ABOUT).write_bytes(changed)
        if changed == before:
            snapshots.read(fuzzed)
        else:
            with pytest.raises(InputError, match=ABOUT):
                snapshots.read(fuzzed)
    finally:
        (fuzzed / ABOUT).write_bytes(before)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    """An output folder with one image."""
    out = tmp_path_factory.mktemp("drawn")
    save_png(
        Image.new("RGB", (8, 8)),
        out / "images/x/0-late.png",
        {CHUNK: json.dumps({"prompt": "a", "seed": 0, "kind": "late", "settings": {}})},
    )
    return out


@often
@given(
    lines=st.lists(
        of_a_line.map(json.dumps) | json_values.map(json.dumps) | st.text(max_size=40), max_size=5
    ),
    whole=st.booleans(),
)
def test_any_results_are_read_on_a_rerun_and_shown_in_a_report(drawn, lines, whole):
    """The images are the record: whatever the index says, a rerun makes the same one, and scores
    alone are taken over.
    """
    (drawn / "results.jsonl").write_text(
        "\n".join(lines) + "\n" * whole, encoding="utf-8", errors="replace"
    )
    (row,) = read_index(drawn)
    assert (row.prompt, row.seed, row.kind, row.file) == (
        "a",
        0,
        "late",
        "images/x/0-late.png",
    )
    assert write_report(drawn).read_text(encoding="utf-8").startswith("<!doctype html>")


@often
@given(
    said=json_values
    | st.dictionaries(
        st.sampled_from(["prompt", "seed", "kind", "settings"]), json_values, max_size=4
    )
)
def test_any_provenance_is_ours_or_not(drawn, said):
    image = drawn / "images/y/1-late.png"
    save_png(Image.new("RGB", (8, 8)), image, {CHUNK: json.dumps(said)})
    try:
        assert len(read_index(drawn)) in (1, 2)
    finally:
        shutil.rmtree(image.parent)

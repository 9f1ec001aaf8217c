"""Prompts and seeds as people write them, the warnings about them, and where their words' tokens
are.
"""

from __future__ import annotations

import re
import warnings

import pytest
import torch

from dreamblend.blending.data import PromptData
from dreamblend.blending.prompts import check_prompts, read_prompts, read_seeds, without_identifier
from dreamblend.errors import InputError
from dreamblend.models import load_backbone


@pytest.fixture(scope="module")
def model(tiny_base):
    return load_backbone(str(tiny_base))


# -------------------------------------------------------------------------------------------- seeds
@pytest.mark.parametrize(
    "text, expected",
    [
        ("0", [0]),
        ("0-3", [0, 1, 2, 3]),
        ("0,5,7-9", [0, 5, 7, 8, 9]),
        (" 1 , 2 - 3 ", [1, 2, 3]),
        ("3-3", [3]),
        ("2,0-3,2", [2, 0, 1, 3]),
        ("007", [7]),
        ("4294967296", [2**32]),
        (7, [7]),
    ],
)
def test_seeds_are_numbers_and_ranges_without_repeats(text, expected):
    assert read_seeds(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "a",
        "3-1",
        "1,",
        ",1",
        "1,,2",
        "-1",
        "1--2",
        "1-2-3",
        "1.5",
        "0x10",
        "1;2",
        "²",
        "1\n",
    ],
)
def test_seeds_that_are_not_understood_say_how_to_write_them(text):
    with pytest.raises(InputError, match=re.escape(repr(text)) + ".*0-3"):
        read_seeds(text)


def test_a_seed_that_no_generator_takes_is_refused():
    torch.Generator().manual_seed(2**64 - 1)
    assert read_seeds(str(2**64 - 1)) == [2**64 - 1]
    for text in (str(2**64), f"0-{10**12}"):
        with pytest.raises(InputError, match="seeds"):
            read_seeds(text)


# ------------------------------------------------------------------------------------------ prompts
def test_prompts_are_taken_as_given_with_the_subject_filled_in():
    found = read_prompts(
        ["a {subject} on a beach", "a sks mug, red", "{subject} and {subject}"], "sks", "mug"
    )
    assert found == ["a sks mug on a beach", "a sks mug, red", "sks mug and sks mug"]


def test_one_prompt_need_not_be_a_list():
    assert read_prompts("a {subject}", "sks", "mug") == ["a sks mug"]


@pytest.mark.parametrize(
    "prompt, said",
    [
        ("a sks mug on a beach", "a mug on a beach"),
        ("A SKS mug, seen by a sks-like robot", "A mug, seen by a sks-like robot"),
        ("a sks mug's handle, sks", "a mug's handle,"),
        ("a (sks mug)1.3 in snow", "a (mug)1.3 in snow"),
        ("a sks++ (sks)1.2 mug", "a mug"),
        ("a mug with asks", "a mug with asks"),
    ],
)
def test_the_class_prompt_leaves_the_identifier_out(prompt, said):
    assert without_identifier(prompt, "sks") == said


def test_other_braces_are_left_alone():
    assert read_prompts(["a {colour} {subject} {}"], "sks", "mug") == ["a {colour} sks mug {}"]


def test_blank_prompts_and_repeats_are_dropped_and_the_order_is_kept():
    found = read_prompts(
        ["b {subject}", "  ", "a  sks\tmug ", "a {subject}", "b sks mug", "B sks mug"], "sks", "mug"
    )
    assert found == ["b sks mug", "a sks mug", "B sks mug"]


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_a_file_holds_a_prompt_a_line_and_comments(tmp_path, ending):
    file = tmp_path / "prompts.txt"
    file.write_bytes(
        ending.join(
            [
                "# places",
                "a {subject} on a beach",
                "",
                "   # indented",
                "  a sks mug in Zürich  ",
                "a #1 {subject}",
            ]
        ).encode()
    )
    assert read_prompts(str(file), "sks", "mug") == [
        "a sks mug on a beach",
        "a sks mug in Zürich",
        "a #1 sks mug",
    ]


def test_a_file_from_windows_may_begin_with_a_byte_order_mark(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("# places\na {subject}".encode("utf-8-sig"))
    assert read_prompts(str(file), "sks", "mug") == ["a sks mug"]
    file.write_bytes("a {subject}".encode("utf-8-sig"))
    assert read_prompts(str(file), "sks", "mug") == ["a sks mug"]


def test_a_files_name_may_have_spaces(tmp_path):
    file = tmp_path / "my prompts.txt"
    file.write_text("a {subject}")
    assert read_prompts(str(file), "sks", "mug") == ["a sks mug"]


def test_files_and_prompts_mix(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "two.txt").write_text("b\na\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "list").write_text("c")
    assert read_prompts(["a", "two.txt", "folder/list"], "sks", "mug") == ["a", "b", "c"]


def test_a_prompt_with_a_slash_is_a_prompt():
    assert read_prompts(["a black/white sks mug"], "sks", "mug") == ["a black/white sks mug"]


@pytest.mark.parametrize("name", ["PROMPTS.TXT", "prompts.md", "prompts", "my prompts", "list.1"])
def test_a_file_that_exists_is_read_whatever_its_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text("a {subject}")
    assert (
        read_prompts(name, "sks", "mug")
        == read_prompts([str(tmp_path / name)], "sks", "mug")
        == ["a sks mug"]
    )


def test_a_file_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "list").write_text("a {subject}")
    assert read_prompts("~/list", "sks", "mug") == ["a sks mug"]


@pytest.mark.parametrize("text", ["[a {subject} on b, c]", "[a: b, c]", " [a {subject}] "])
def test_a_list_that_yaml_cannot_read_says_how_to_write_one(text):
    with pytest.raises(InputError, match=re.escape("""--prompts '["...", "..."]'""")):
        read_prompts(text, "sks", "mug")


@pytest.mark.parametrize(
    "prompt, found",
    [
        ("a (sks:1.3) mug", "(sks:1.3)"),
        ("a ((sks)) mug", "((sks))"),
        ("a sks mug, [blurry]", "[blurry]"),
        ("a [sks:red:0.5] mug", "[sks:red:0.5]"),
        ("a sks mug <lora:sks-v2:.8>", "<lora:sks-v2:.8>"),
        ("a sks++ mug", "sks++"),
        ("a (sks mug:1.1), <LoRA:x:1>", "(sks mug:1.1), <LoRA:x:1>"),
    ],
)
def test_weights_and_adapters_of_other_tools_are_told(prompt, found):
    with pytest.warns(UserWarning, match=re.escape(f" has {found}: weights")):
        assert read_prompts(prompt, "sks", "mug") == [prompt]


@pytest.mark.parametrize(
    "prompt",
    [
        "a sks mug (the red one)",
        "a sks mug (at 10:30)",
        "a (1:2) sks mug",
        "a <sks> mug",
        "a sks mug: red",
        "a sks mug -- red",
        "C++11 sks mug",
        "a sks mug :)",
    ],
)
def test_prose_with_signs_passes_without_a_word(prompt):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_prompts(prompt, "sks", "mug") == [prompt]


def test_what_belongs_to_a_weight_is_no_content_word(model):
    def words(prompt):
        return [span.word for span in model.spans(prompt)]

    assert words("a (sks:1.3) mug, ((red)) [beach] <lora:sks:0.8>") == [
        "sks",
        "mug",
        "red",
        "beach",
    ]
    assert words("2 sks mugs (at 10:30)") == ["2", "sks", "mugs", "10", "30"]


@pytest.mark.parametrize(
    "name", ["missing.txt", "MISSING.TXT", "missing.md", "no/such/file", "folder/"]
)
def test_a_file_that_is_not_there_is_named(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=re.escape(name) + ".*does not exist"):
        read_prompts(name, "sks", "mug")


def test_a_file_that_is_not_text_is_named(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("a sks mug in Zürich".encode("latin-1"))
    with pytest.raises(InputError, match="prompts.txt is not UTF-8"):
        read_prompts(str(file), "sks", "mug")


@pytest.mark.parametrize("prompts", [[], "", ["", "  "]])
def test_no_prompts_at_all_is_an_error(prompts):
    with pytest.raises(InputError, match="no prompts"):
        read_prompts(prompts, "sks", "mug")


def test_a_file_of_comments_only_is_an_error(tmp_path):
    (tmp_path / "prompts.txt").write_text("# nothing yet\n\n")
    with pytest.raises(InputError, match="no prompts"):
        read_prompts(str(tmp_path / "prompts.txt"), "sks", "mug")


def test_the_pairs_are_all_prompts_with_all_seeds_in_batches():
    data = PromptData(["a {subject}", "b", "b"], "0-2,9", batch_size=3)
    data.pairs = data.all_pairs("sks", "mug")
    assert data.pairs == [(p, s) for p in ("a sks mug", "b") for s in (0, 1, 2, 9)]
    assert [len(batch) for batch in data.predict_dataloader()] == [3, 3, 2]
    assert [pair for batch in data.predict_dataloader() for pair in batch] == data.pairs


def test_shards_share_the_pairs_and_none_is_left_out_or_drawn_twice():
    prompts = ["a {subject}", "b"], "0-2,9"
    shards = [PromptData(*prompts, shard=f"{i}/3").all_pairs("sks", "mug") for i in range(3)]
    assert sorted(sum(shards, [])) == sorted(PromptData(*prompts).all_pairs("sks", "mug")) and [
        len(s) for s in shards
    ] == [3, 3, 2]
    assert PromptData("a", "0", shard="1/2").all_pairs("sks", "mug") == []


@pytest.mark.parametrize("text", ["", "1", "3/3", "0/0", "-1/3", "1/3/3", "1 of 3"])
def test_a_shard_that_is_none_says_how_to_write_one(text):
    with pytest.raises(InputError, match=re.escape(repr(text)) + ".*1/3"):
        PromptData(["a"], shard=text)


@pytest.mark.parametrize("size", [0, -1])
def test_a_batch_holds_at_least_one(size):
    with pytest.raises(InputError, match=f"batch_size is {size}"):
        PromptData(["a"], batch_size=size)


# ----------------------------------------------------------------------------------------- warnings
def warned(model, prompt: str, identifier: str = "sks", class_noun: str = "mug") -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_prompts([prompt], model, identifier, class_noun)
    return [str(w.message) for w in caught]


@pytest.mark.parametrize(
    "prompt", ["a sks mug on a beach", "A SKS Mug.", "(sks mug)", "sks' mug's handle", "mug, sks"]
)
def test_a_prompt_that_names_the_subject_passes_without_a_word(model, prompt):
    assert warned(model, prompt) == []


@pytest.mark.parametrize(
    "prompt, lacks",
    [
        ("a mug on a beach", ["identifier 'sks'"]),
        ("a sks on a beach", ["class noun 'mug'"]),
        ("a beach", ["identifier 'sks'", "class noun 'mug'"]),
        ("a sksx mug", ["identifier 'sks'"]),
        ("a sks smug mugs", ["class noun 'mug'"]),
    ],
)
def test_a_prompt_that_lacks_the_identifier_or_the_class_noun_is_told_so(model, prompt, lacks):
    messages = warned(model, prompt)
    assert len(messages) == len(lacks)
    for message, part in zip(messages, lacks):
        assert repr(prompt) in message and f"lacks the {part}" in message and "sks mug" in message


def test_identifiers_of_signs_and_class_nouns_of_two_words_are_found(model):
    assert warned(model, "a <my-cat> teddy bear.", "<my-cat>", "teddy bear") == []
    assert len(warned(model, "a my-cat bear", "<my-cat>", "teddy bear")) == 2


def test_words_beyond_the_token_limit_are_named(model):
    fitting = " ".join(
        ["a sks mug"] + ["red"] * 27
    )  # 30 tokens, beside the two that begin and end a prompt
    assert len(model.tokenizer(fitting).input_ids) == model.length and warned(model, fitting) == []
    (message,) = warned(model, f"{fitting} in the snow")
    assert (
        "over the token limit" in message
        and message.endswith(": in the snow")
        and len(message) < 200
    )
    one_more = f"{fitting} red"  # where the end of the text is to stand
    assert model.dropped_words(one_more) == ["red"] and model.spans(one_more) == model.spans(
        fitting
    )


def test_a_word_cut_in_the_middle_falls_off(model):
    prompt = " ".join(["a sks mug"] + ["red"] * 26 + ["wonderful"])
    tokens = model.tokenizer(prompt).input_ids
    assert (
        len(tokens) > model.length
        and model.tokenizer.convert_ids_to_tokens(tokens[model.length - 2]) == "w"
    )
    assert model.dropped_words(prompt) == ["wonderful"] and model.spans(prompt)[-1].word == "red"


# -------------------------------------------------------------------------------------------- spans
def spans(model, prompt: str) -> list[tuple[str, str]]:
    """Each content word, and what its tokens say, read from the ids that the text encoder gets."""
    ids = model.tokenizer(
        prompt, padding="max_length", max_length=model.length, truncation=True
    ).input_ids
    return [
        (span.word, model.tokenizer.decode([ids[i] for i in span.tokens]).strip())
        for span in model.spans(prompt)
    ]


@pytest.mark.parametrize(
    "prompt, words",
    [
        ("a sks mug on the beach", ["sks", "mug", "beach"]),
        (
            "a photo of a sks mug in front of an orange sky",
            ["sks", "mug", "orange", "sky"],
        ),  # stopwords
        (
            "mug, red mug; a (blue) mug!",
            ["mug", "red", "mug", "blue", "mug"],
        ),  # repeats, punctuation
        ("A SKS Mug IN The Snow", ["SKS", "Mug", "Snow"]),
        ("a wonderful castle", ["wonderful", "castle"]),  # several tokens each
        ("a mug's handle, mug’s rim", ["mug's", "handle", "mug’s", "rim"]),
        ("a state-of-the-art mug - new", ["state-of-the-art", "mug", "new"]),
        ("  two   spaces\tmug\n", ["two", "spaces", "mug"]),
        ("naïve Bücherregal 猫 mug", ["naïve", "Bücherregal", "猫", "mug"]),
        ("e\u0301clair mug", ["e\u0301clair", "mug"]),  # an accent of its own
        ("🐱 mug 🐱", ["mug"]),
        ("3 mugs, 12 o'clock", ["3", "mugs", "12", "o'clock"]),
        ("İstanbul mug", ["İstanbul", "mug"]),  # longer in lower case
        ("of the", []),
        ("", []),
        ("?!...", []),
    ],
)
def test_spans_are_the_content_words_with_their_own_tokens(model, prompt, words):
    import unicodedata

    found = spans(model, prompt)
    assert [word for word, _ in found] == words

    def plain(text):
        return unicodedata.normalize("NFC", text.lower()).replace(" ", "")

    assert [plain(said) for _, said in found] == [plain(word) for word in words]


def test_repeated_words_have_their_own_positions_in_order(model):
    found = model.spans("mug red mug and a mug")
    positions = [span.tokens for span in found]
    assert positions == [(1,), (2,), (3,), (6,)]
    assert found[0].word == found[2].word == "mug"


def test_words_of_several_tokens_have_neighbouring_positions(model):
    for span in model.spans("a wonderful sks castle in Zürich"):
        assert (
            span.tokens == tuple(range(span.tokens[0], span.tokens[-1] + 1)) and span.tokens[0] > 0
        )
    assert len(model.spans("a wonderful castle")[0].tokens) > 1


def test_positions_are_those_of_the_encoded_states(model):
    """A word exchanged changes the states from its position on (the text encoder is causal), and
    none before.
    """
    prompts = ["a sks mug on the beach", "a sks mug on the snow"]
    first = model.spans(prompts[0])[-1].tokens[0]
    states = model.encode_prompts(prompts).states
    differs = (states[0] - states[1]).abs().amax(1) > 1e-5
    assert not differs[:first].any() and differs[first]


def test_no_span_reaches_the_end_of_text_of_a_prompt_that_is_cut(model):
    prompt = " ".join(f"mug{i}" for i in range(40))
    ids = model.tokenizer(
        prompt, padding="max_length", max_length=model.length, truncation=True
    ).input_ids
    assert ids[-1] == model.tokenizer.eos_token_id
    assert all(max(span.tokens) < model.length - 1 for span in model.spans(prompt))
    kept, dropped = [span.word for span in model.spans(prompt)], model.dropped_words(prompt)
    assert kept + dropped == prompt.split() and kept and dropped

"""The families' real tokenizer classes over small vocabularies made here.

Every word of `WORDS` and of the families' templates is one token; other words fall into pieces, as
"sks" and "snow" do.
"""

from __future__ import annotations

import json

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

TEMPLATES = (  # Qwen-Image cuts 34 tokens off: its template must give just those
    "system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:\nuser\nassistant\n"
)
WORDS = "a photo of dog cat in on grass under red blue house with and mug table the"
PIECES = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+")
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())

QWEN_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
MISTRAL_CHAT = (
    "<s>{% for message in messages %}"
    "{% if message.role == 'system' %}[SYSTEM_PROMPT]{{ message.content[0].text }}[/SYSTEM_PROMPT]"
    "{% else %}[INST]{{ message.content[0].text }}[/INST]{% endif %}{% endfor %}"
)


def clip_tokenizer(pad: str = "<|endoftext|>"):
    """`!` is token 0; start and end come last, as pooling finds the end as the largest id."""
    from transformers import CLIPTokenizer

    words = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    merges = _merges(WORDS, words, suffix="</w>")
    pieces = [*ALPHABET, *(f"{letter}</w>" for letter in ALPHABET), *map("".join, merges)]
    vocab = _numbered([*pieces, "<|startoftext|>", "<|endoftext|>"])
    return CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad, model_max_length=77)


def t5_tokenizer(max_length: int = 512):
    """Pad, end and unknown are tokens 0, 1, 2."""
    from transformers import T5Tokenizer

    letters = [chr(code) for code in range(33, 127)]
    scores = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0, "▁": -4.0}
    scores |= {f"▁{word}": -3.0 for word in WORDS.split()} | {letter: -6.0 for letter in letters}
    scores |= {f"<extra_id_{i}>": 0.0 for i in range(99, -1, -1)}
    return T5Tokenizer(vocab=list(scores.items()), model_max_length=max_length)


def qwen_tokenizer():
    """Padded on the right with `<|endoftext|>`; a chat template as Qwen3's, thinking included."""
    from transformers import Qwen2Tokenizer

    merges = _merges(TEMPLATES + WORDS, _byte_pieces())
    special = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
    special += ["<|vision_pad|>", "<|image_pad|>", "<|video_pad|>", "<think>", "</think>"]
    return Qwen2Tokenizer(
        vocab=_numbered([*ALPHABET, *map("".join, merges), "<|endoftext|>", *special]),
        merges=merges,
        eos_token="<|im_end|>",
        extra_special_tokens=special,
        chat_template=QWEN_CHAT,
        model_max_length=131072,
    )


def gemma_tokenizer():
    """Starts with `<bos>`; what no token covers falls back to bytes."""
    from transformers import GemmaTokenizer

    words = pre_tokenizers.Split(" ", "merged_with_next")
    merges = [
        (a.replace(" ", "▁"), b.replace(" ", "▁"))
        for a, b in _merges(f" {WORDS}", words, byte_level=False)
    ]
    letters = ["▁", *(chr(code) for code in range(33, 127)), "\n"]
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    return GemmaTokenizer(
        vocab=_numbered([*special, *fallback, *letters, *map("".join, merges)]),
        merges=merges,
        model_max_length=8192,
        add_bos_token=True,
    )


def mistral_tokenizer():
    """The tokenizer inside the Pixtral processor that FLUX.2 is published with. The pipeline calls
    both alike, and the processor needs torchvision, which nothing else here does.
    """
    from transformers import PreTrainedTokenizerFast

    merges = _merges(TEMPLATES + WORDS, _byte_pieces())
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]
    special += ["[IMG]", "[IMG_BREAK]", "[IMG_END]", "<pad>"]
    mistral = Tokenizer(
        models.BPE(vocab=_numbered([*special, *ALPHABET, *map("".join, merges)]), merges=merges)
    )
    mistral.pre_tokenizer = _byte_pieces()
    mistral.decoder = decoders.ByteLevel()
    mistral.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=mistral,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        padding_side="left",
        chat_template=MISTRAL_CHAT,
        model_max_length=131072,
    )


def _byte_pieces():
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(PIECES, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _merges(text: str, pieces, suffix: str = "", byte_level: bool = True) -> list[tuple[str, str]]:
    """Byte pair merges that make every piece of the text one token."""
    trained = Tokenizer(models.BPE(end_of_word_suffix=suffix))
    trained.pre_tokenizer = pieces
    trainer = trainers.BpeTrainer(
        vocab_size=10_000,
        min_frequency=1,
        initial_alphabet=ALPHABET if byte_level else [],
        end_of_word_suffix=suffix,
        show_progress=False,
    )
    trained.train_from_iterator([text], trainer)
    return [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]


def _numbered(tokens: list[str]) -> dict[str, int]:
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}

"""Prompts with weights, `(word)1.3` and `word++`, and of any length, as compel reads them: each
chunk of a long prompt is encoded by itself, and the chunks' states follow each other.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from dreamblend.errors import InputError
from dreamblend.models.text import Conditioning, words_of

KINDS = ("compel",)
ENDS = ("<|startoftext|>", "<|endoftext|>")  # of CLIP's tokenizers


def check(kind: str | None) -> None:
    """Raise InputError where prompts cannot be weighted so."""
    if kind is None:
        return
    if kind not in KINDS:
        raise InputError(f"model.prompt_weighting is {kind!r}: it is compel, or left out")
    if importlib.util.find_spec("compel") is None:
        raise InputError(
            "model.prompt_weighting compel needs the package compel: pip install compel, or leave"
            " it out"
        )


@dataclass(frozen=True)
class Reader:
    """A CLIP text encoder as compel calls one.

    Args:
        tokenizer: its own.
        states: token ids (batch, tokens) and a mask of this shape -> (batch, tokens, channels).
        length: tokens of a chunk, with both ends.
        device, dtype: of the states.
        sees_padding: whether the mask leaves the padding in.
    """

    tokenizer: Any
    states: Callable[[Tensor, Tensor | None], Tensor]
    length: int
    device: torch.device
    dtype: torch.dtype
    sees_padding: bool = True

    def __call__(self, ids: Tensor, mask: Tensor | None, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.states(ids, mask))

    def compel(self) -> Any:
        """Made for each use: it keeps the empty prompt's states, and adapters change these."""
        from compel import Compel

        return Compel(
            self.tokenizer,
            self,
            truncate_long_prompts=False,
            padding_attention_mask_value=int(self.sees_padding),
            device=self.device,
            model_max_length=self.length,
        )


@lru_cache(maxsize=4096)
def parsed(prompt: str) -> Any:
    """A prompt as compel's parser understands it: parts of fragments of one weight each. Raises
    InputError for a prompt without words, for what has no place among the columns of one prompt,
    and for another's adapters.
    """
    from compel import Compel
    from compel.prompt_parser import Fragment

    if said := [end for end in ENDS if end in prompt]:
        raise InputError(
            f"the prompt {prompt[:60]!r} has {said[0]}, by which the text encoder knows the ends of"
            " a chunk: leave it out"
        )
    conjunction = Compel.parse_prompt_string(prompt)
    if not conjunction.prompts:
        raise InputError(f"the prompt {prompt[:60]!r} weights no words: name some")
    for part in conjunction.prompts:
        if not all(isinstance(one, Fragment) for one in getattr(part, "children", [part])):
            raise InputError(
                f"the prompt {prompt[:60]!r} has .blend() or .swap(), in which a word has no place"
                " of its own, so that its attention cannot be read: leave it out"
            )
    if conjunction.lora_weights:
        raise InputError(
            f"the prompt {prompt[:60]!r} names a LoRA, and what a blend draws with is its two"
            " snapshots: leave it out"
        )
    return conjunction


def plain(prompt: str) -> str:
    """Its words without their weights."""
    return " ".join(one.text for part in parsed(prompt).prompts for one in part.children)


def encode(readers: list[Reader], prompts: list[str]) -> Tensor:
    """(batch, columns, channels) of the encoders side by side. Prompts of fewer chunks than the
    longest of them are padded with the empty prompt's.
    """
    beside = []
    for reader in readers:
        compel = reader.compel()
        states = [
            compel.build_conditioning_tensor_for_conjunction(parsed(prompt))[0]
            for prompt in prompts
        ]
        beside.append(torch.cat(compel.pad_conditioning_tensors_to_same_length(states)))
    return torch.cat(beside, dim=-1)


def padded(conditioning: Conditioning, columns: int, readers: list[Reader]) -> Conditioning:
    """The same with so many columns, by the empty prompt's chunks. Zeros, which stand for no prompt
    in SDXL, stay zeros.
    """
    states = conditioning.states
    lacking = (columns - states.shape[1]) // readers[0].length
    if not lacking:
        return conditioning
    empty = encode(readers, [""])
    if not states.any():
        empty = torch.zeros_like(empty)
    padding = empty.to(states).repeat(len(states), lacking, 1)
    return Conditioning(torch.cat([states, padding], dim=1), conditioning.extras)


def words(reader: Reader, prompt: str) -> tuple[list[tuple[str, tuple[int, ...]]], int]:
    """Every word with the positions of its tokens among the columns, and how many columns there
    are.
    """
    provider, found, before = reader.compel().conditioning_provider, [], 0
    for part in parsed(prompt).prompts:
        texts = [one.text for one in part.children]
        tokens = provider.get_token_ids_and_expand_weights(texts, [1.0] * len(texts), "cpu")[0]
        chunks = tokens.reshape(-1, reader.length).tolist()
        # what is between the ends of each chunk, in the order of the text
        columns = iter(
            before + row * reader.length + column
            for row, chunk in enumerate(chunks)
            for column in range(1, chunk.index(reader.tokenizer.eos_token_id))
        )
        for text in texts:
            encoded = reader.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            own = [column for _, column in zip(encoded.input_ids, columns)]
            found += [
                (word, tuple(own[i] for i in inside))
                for word, inside in words_of(text, encoded.offset_mapping)
            ]
        before += len(tokens)
    return found, before

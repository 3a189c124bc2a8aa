"""Text to token ids and back, from what a GGUF file says about its tokenizer.

The algorithms are those of the `tokenizers` library; this file reads the metadata, decodes, and keeps one rule: text
becomes a control token only where the caller asks for it with `parse_special`, as the chat template does.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from turbosparse.errors import UserError
from turbosparse.model.chat_template import render_chat
from turbosparse.model.gguf import GGUFFile
from turbosparse.model.pretokenizers import PRE_TOKENIZERS
from turbosparse.model.segmenters import ByteLevelBPE, Segmenter, SentencePieceBPE
from turbosparse.model.tokenizer_export import tokenizer_metadata
from turbosparse.model.tokenizer_save import save_pipeline
from turbosparse.model.vocabulary import CONTROL, UNKNOWN, USER_DEFINED, Vocabulary

__all__ = ["TokenStream", "Tokenizer", "tokenizer_metadata"]

# Chat models end a turn with one of these; many files name only one of them as EOS.
_END_OF_TURN = frozenset(
    ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>", "<|endoftext|>", "<|end_of_text|>")
)


class Tokenizer:
    """The tokenizer of one model.

    Attributes:
        vocab_size: number of ids; ids are 0 .. vocab_size - 1.
        bos_id, eos_id, unk_id, pad_id: None where the file names none.
        eos_ids: every id that ends a generation: EOS, end of turn, end of message.
        add_bos: whether `encode` puts BOS in front when not told otherwise.
        chat_template: Jinja source, or None.
    """

    def __init__(
        self, vocabulary: Vocabulary, segmenter: Segmenter, metadata: Mapping[str, Any], add_bos: bool
    ) -> None:
        """Use `from_gguf`."""
        self._vocabulary, self._segmenter = vocabulary, segmenter
        self.source = vocabulary.source
        self.vocab_size = len(vocabulary)
        self.bos_id = self._special_id(metadata, "bos")
        self.eos_id = self._special_id(metadata, "eos")
        self.unk_id = self._special_id(metadata, "unknown")
        self.pad_id = self._special_id(metadata, "padding")
        ends = {self._special_id(metadata, name) for name in ("eos", "eot", "eom")} - {None}
        ends |= {i for i in vocabulary.of_type(CONTROL, USER_DEFINED) if vocabulary.tokens[i] in _END_OF_TURN}
        self.eos_ids: frozenset[int] = frozenset(i for i in ends if i is not None)
        self.add_bos = _flag(self.source, metadata, "add_bos_token", add_bos) and self.bos_id is not None
        template = metadata.get("tokenizer.chat_template")
        self.chat_template = template if isinstance(template, str) and template else None
        self._piece = lru_cache(maxsize=1 << 16)(vocabulary.piece)

    @classmethod
    def from_gguf(cls, file: GGUFFile) -> Tokenizer:
        """The tokenizer inside a GGUF file; merges are read when the first text is encoded.

        Raises:
            UserError: the file has no tokenizer, one of an unknown kind, or one that contradicts itself.
        """
        vocabulary = Vocabulary.from_gguf(file)
        if vocabulary.model == "llama":
            prefix = _flag(vocabulary.source, file.metadata, "add_space_prefix", True)
            return cls(vocabulary, SentencePieceBPE(vocabulary, prefix), file.metadata, add_bos=True)
        name = file.metadata.get("tokenizer.ggml.pre", "default")
        if not isinstance(name, str) or name not in PRE_TOKENIZERS:
            raise UserError(
                f"{vocabulary.source} has the unknown tokenizer.ggml.pre {str(name)[:40]!r}; "
                f"known are {', '.join(sorted(PRE_TOKENIZERS))}."
            )
        pre_tokenizer = PRE_TOKENIZERS[name]
        return cls(vocabulary, ByteLevelBPE(vocabulary, pre_tokenizer), file.metadata, pre_tokenizer.add_bos)

    def encode(self, text: str, add_bos: bool | None = None, parse_special: bool = False) -> list[int]:
        """Token ids of a text.

        Args:
            text: any text; a lone surrogate is an error.
            add_bos: put BOS in front; None: as the file says.
            parse_special: take control tokens that are written out in the text for themselves. Never for text that is
                not trusted.

        Raises:
            UserError: the text is not valid Unicode, or the file's merges do not fit its tokens.
        """
        try:
            ids = self._segmenter.encode(text, parse_special)
        except (UnicodeEncodeError, TypeError) as error:
            raise UserError(
                "The text is not valid Unicode (it holds half a surrogate pair); give it as UTF-8."
            ) from error
        wants_bos = self.add_bos if add_bos is None else add_bos
        return [self.bos_id, *ids] if wants_bos and self.bos_id is not None else ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of whole ids; bytes that are not UTF-8 become U+FFFD. Control tokens are left out or written out."""
        text = b"".join(self._bytes(index, skip_special) for index in ids).decode("utf-8", "replace")
        return text.removeprefix(" ") if self._segmenter.space_prefix else text

    def stream(self, skip_special: bool = True) -> TokenStream:
        """A decoder that is fed token by token."""
        return TokenStream(self, skip_special)

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """The prompt for a conversation; encode it with `add_bos=False, parse_special=True`.

        Raises:
            UserError: the model has no chat template, or the template fails, refuses the messages or does not end.
        """
        if self.chat_template is None:
            raise UserError(f"{self.source} has no chat template; continue raw text with `turbosparse run` instead.")
        return render_chat(
            self.chat_template,
            messages,
            add_generation_prompt=add_generation_prompt,
            tokens={f"{name}_token": self._text(index) for name, index in self._named_ids().items()},
        )

    def save_hf(self, folder: str | Path) -> None:
        """Write it as a Hugging Face tokenizer: tokenizer.json, tokenizer_config.json and the chat template.

        transformers' own reading of GGUF tokenizers differs from the original models (words of digits, scores, EOS), so
        whoever turns a GGUF file into a folder takes this one.
        """
        texts = {f"{name}_token": self._text(index) for name, index in self._named_ids().items() if index is not None}
        bos = None if self.bos_id is None or not self.add_bos else (self._text(self.bos_id), self.bos_id)
        save_pipeline(Path(folder), self._segmenter, texts, bos, self.chat_template)

    def _named_ids(self) -> dict[str, int | None]:
        return {"bos": self.bos_id, "eos": self.eos_id, "unk": self.unk_id, "pad": self.pad_id}

    def _text(self, index: int | None) -> str:
        return "" if index is None else self._vocabulary.tokens[index]

    def _bytes(self, index: int, skip_special: bool) -> bytes:
        if not 0 <= index < self.vocab_size:
            raise ValueError(f"token id {index} is outside the vocabulary of {self.vocab_size}")
        special = skip_special and self._vocabulary.types[index] in (CONTROL, UNKNOWN)
        return b"" if special else self._piece(index)

    def _special_id(self, metadata: Mapping[str, Any], name: str) -> int | None:
        key = f"tokenizer.ggml.{name}_token_id"
        value = metadata.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < self.vocab_size:
            raise UserError(f"{self.source}: {key} is {str(value)[:40]}, not a token id below {self.vocab_size}.")
        return value


class TokenStream:
    """Text as it is generated: what `step` returns, joined, is the text of the ids, and never half a character."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool) -> None:
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def step(self, index: int) -> str:
        """The text that one more token completes; "" while a character is unfinished."""
        return self._decoder.decode(self._tokenizer._bytes(index, self._skip_special))

    def finish(self) -> str:
        """What is left at the end: U+FFFD for a character that was never completed, else ""."""
        return self._decoder.decode(b"", final=True)


def _flag(source: str, metadata: Mapping[str, Any], name: str, default: bool) -> bool:
    value = metadata.get(f"tokenizer.ggml.{name}", default)
    if not isinstance(value, bool):
        raise UserError(f"{source}: tokenizer.ggml.{name} is {str(value)[:40]}, not a boolean.")
    return value

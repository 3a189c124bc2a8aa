"""Text to token ids: the two kinds of BPE that GGUF files hold, on top of the `tokenizers` library.

Both are lazy, because a program that runs a short prompt should not wait for a quarter of a million merges.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Set
from functools import cached_property
from threading import Lock
from typing import NoReturn, Protocol

from tokenizers import AddedToken, models, normalizers
from tokenizers import Tokenizer as Pipeline

from turbosparse.errors import UserError
from turbosparse.model.pretokenizers import PreTokenizer
from turbosparse.model.vocabulary import (
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    USER_DEFINED,
    Vocabulary,
    byte_characters,
    merges_from_scores,
)

_BYTE_CHARACTERS = byte_characters()


class Segmenter(Protocol):
    """Cuts text into token ids. `parse_special`: control tokens written out in the text are taken for themselves."""

    space_prefix: bool

    @property
    def pipeline(self) -> Pipeline: ...

    def encode(self, text: str, parse_special: bool) -> list[int]: ...


class _Lazy(ABC):
    """What both kinds share: which model cuts a text.

    A model is built for each text from the tokens that occur in it, until that has cost about what the whole model
    costs; from then on the whole one is used. The cost is counted in characters: a text costs its length, and a fixed
    number for what takes part in every text.
    """

    cost_of_whole: int
    cost_of_small: int

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._lock = Lock()
        self._cost = 0

    @cached_property
    def pipeline(self) -> Pipeline:
        """The whole tokenizer, without decoder and post-processor."""
        return self._build(self._known)

    def encode(self, text: str, parse_special: bool) -> list[int]:
        with self._lock:
            self._cost += self.cost_of_small + len(text)
            occurring = self._occurring(text) if self._cost <= self.cost_of_whole else None
            return _encode(self.pipeline if occurring is None else self._build(occurring), text, parse_special)

    @property
    @abstractmethod
    def _known(self) -> Set[str]:
        """The tokens that merging can reach in some text."""

    @abstractmethod
    def _occurring(self, text: str) -> Set[str] | None:
        """Those that it can reach in this text; None where that cannot be told."""

    @abstractmethod
    def _build(self, tokens: Set[str]) -> Pipeline:
        """A tokenizer whose merges reach these tokens."""

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self._known), default=0)

    def _parts(self, text: str) -> set[str]:
        """Everything in the text that is as short as tokens are."""
        longest = self._longest
        return {
            text[start:end]
            for start in range(len(text))
            for end in range(start + 1, min(start + longest, len(text)) + 1)
        }


class ByteLevelBPE(_Lazy):
    """BPE on UTF-8 bytes (GPT-2, Qwen, Llama 3, SmolLM). Sennrich et al. 2016, Radford et al. 2019."""

    space_prefix = False
    cost_of_whole, cost_of_small = 1500, 500  # a tenth of a second with 49k tokens

    def __init__(self, vocabulary: Vocabulary, pre_tokenizer: PreTokenizer) -> None:
        super().__init__(vocabulary)
        self._pre_tokenizer = pre_tokenizer

    @property
    def _known(self) -> Set[str]:
        return self._vocabulary.ids.keys()

    def _occurring(self, text: str) -> Set[str] | None:
        # A normalizer may change what is not ASCII.
        return self._known & self._parts(text.translate(_BYTE_CHARACTERS)) if text.isascii() else None

    def _build(self, tokens: Set[str]) -> Pipeline:
        vocabulary = self._vocabulary
        # Merges that build a control token are left out: what a user types must not become one.
        control = {vocabulary.tokens[index] for index in vocabulary.of_type(CONTROL, UNKNOWN)}
        added = [vocabulary.tokens[index] for index in vocabulary.of_type(CONTROL, UNKNOWN, USER_DEFINED)]
        known, merges = vocabulary.ids, []
        for left, right in vocabulary.merges:
            if left not in known or right not in known:
                _fail(vocabulary)  # the library would panic at some of these
            if left not in tokens or right not in tokens or (merged := left + right) in control:
                continue
            if merged not in known:
                _fail(vocabulary)
            if merged in tokens:
                merges.append((left, right))
        ids = {token: known[token] for token in (*tokens, *added)}
        pipeline = _pipeline(vocabulary, ids, merges, ignore_merges=self._pre_tokenizer.ignore_merges)
        pipeline.pre_tokenizer = self._pre_tokenizer.build()
        if (normalizer := self._pre_tokenizer.normalizer()) is not None:
            pipeline.normalizer = normalizer
        return pipeline


class SentencePieceBPE(_Lazy):
    """BPE on characters with a fallback to bytes (Gemma, Mistral, Llama 2). Kudo and Richardson 2018.

    `space_prefix`: a space goes before the text, and before the text after each added token.
    """

    cost_of_whole, cost_of_small = 20_000, 300  # some seconds with 262k tokens

    def __init__(self, vocabulary: Vocabulary, space_prefix: bool) -> None:
        super().__init__(vocabulary)
        self.space_prefix = space_prefix

    @cached_property
    def _known(self) -> Set[str]:
        vocabulary = self._vocabulary
        return {token for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True) if kind == NORMAL}

    @cached_property
    def _always(self) -> list[str]:
        """Tokens that take part whatever the text: added tokens, bytes, the unknown token."""
        vocabulary = self._vocabulary
        return [vocabulary.tokens[index] for index in vocabulary.of_type(UNKNOWN, CONTROL, USER_DEFINED, BYTE)]

    def _occurring(self, text: str) -> Set[str] | None:
        parts = self._parts(text.replace(" ", SPACE))
        if self.space_prefix:  # a prefix may come before any part, since each added token starts anew
            parts |= {SPACE + part for part in parts} | {SPACE}
        return self._known & parts

    def _build(self, tokens: Set[str]) -> Pipeline:
        vocabulary = self._vocabulary
        ids = {token: vocabulary.ids[token] for token in (*tokens, *self._always)}
        if vocabulary.merges:
            merges = [(a, b) for a, b in vocabulary.merges if a in ids and b in ids and a + b in tokens]
        else:
            merges = merges_from_scores(vocabulary, tokens)
        unknown = next((vocabulary.tokens[index] for index in vocabulary.of_type(UNKNOWN)), None)
        pipeline = _pipeline(vocabulary, ids, merges, byte_fallback=True, fuse_unk=True, unk_token=unknown)
        steps: list[normalizers.Normalizer] = [normalizers.Prepend(SPACE)] if self.space_prefix else []
        pipeline.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
        return pipeline


def _pipeline(
    vocabulary: Vocabulary, ids: dict[str, int], merges: list[tuple[str, str]], **options: object
) -> Pipeline:
    try:
        pipeline = Pipeline(models.BPE(vocab=ids, merges=merges, **options))
    except Exception:  # the library raises nothing narrower
        _fail(vocabulary)
    texts = vocabulary.tokens
    # An empty added token would match everywhere.
    control = [texts[index] for index in vocabulary.of_type(CONTROL, UNKNOWN) if texts[index]]
    pipeline.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in control])
    own = [texts[index] for index in vocabulary.of_type(USER_DEFINED) if texts[index]]
    pipeline.add_tokens([AddedToken(text, special=False, normalized=False) for text in own])
    return pipeline


def _fail(vocabulary: Vocabulary) -> NoReturn:
    raise UserError(f"{vocabulary.source} has no usable tokenizer: its merges do not fit its tokens.")


def _encode(pipeline: Pipeline, text: str, parse_special: bool) -> list[int]:
    pipeline.encode_special_tokens = not parse_special
    return pipeline.encode(text, add_special_tokens=False).ids

"""Text to token ids: the two kinds of BPE that GGUF files hold, on top of the `tokenizers` library.

Both are lazy, because a program that runs a short prompt should not wait for a quarter of a million merges.
"""

from __future__ import annotations

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
    merges_from_scores,
)

# A SentencePiece model is built for each text from the tokens that occur in it, until that has cost about what the
# whole model costs (some seconds for 262k tokens); from then on the whole one is used. The cost is counted in
# characters; a text costs its length, and this much for the tokens that take part in every text.
_COST_OF_WHOLE_MODEL = 20_000
_COST_OF_SMALL_MODEL = 300


class Segmenter(Protocol):
    """Cuts text into token ids. `parse_special`: control tokens written out in the text are taken for themselves."""

    space_prefix: bool

    @property
    def pipeline(self) -> Pipeline: ...

    def encode(self, text: str, parse_special: bool) -> list[int]: ...


class ByteLevelBPE:
    """BPE on UTF-8 bytes (GPT-2, Qwen, Llama 3, SmolLM). Sennrich et al. 2016, Radford et al. 2019."""

    space_prefix = False

    def __init__(self, vocabulary: Vocabulary, pre_tokenizer: PreTokenizer) -> None:
        self._vocabulary, self._pre_tokenizer = vocabulary, pre_tokenizer
        self._lock = Lock()

    @cached_property
    def pipeline(self) -> Pipeline:
        """The whole tokenizer, without decoder and post-processor."""
        vocabulary = self._vocabulary
        # Merges that build a control token are left out: what a user types must not become one.
        control = {vocabulary.tokens[index] for index in vocabulary.of_type(CONTROL, UNKNOWN)}
        merges = [merge for merge in vocabulary.merges if merge[0] + merge[1] not in control]
        ids = vocabulary.ids
        if not all(left in ids and right in ids and left + right in ids for left, right in merges):
            _fail(vocabulary)  # the library would panic at some of these
        pipeline = _pipeline(vocabulary, ids, merges, ignore_merges=self._pre_tokenizer.ignore_merges)
        pipeline.pre_tokenizer = self._pre_tokenizer.build()
        if (normalizer := self._pre_tokenizer.normalizer()) is not None:
            pipeline.normalizer = normalizer
        return pipeline

    def encode(self, text: str, parse_special: bool) -> list[int]:
        with self._lock:
            return _encode(self.pipeline, text, parse_special)


class SentencePieceBPE:
    """BPE on characters with a fallback to bytes (Gemma, Mistral, Llama 2). Kudo and Richardson 2018.

    `space_prefix`: a space goes before the text, and before the text after each added token.
    """

    def __init__(self, vocabulary: Vocabulary, space_prefix: bool) -> None:
        self._vocabulary, self.space_prefix = vocabulary, space_prefix
        self._lock = Lock()
        self._cost = 0

    @cached_property
    def _normal(self) -> set[str]:
        vocabulary = self._vocabulary
        return {token for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True) if kind == NORMAL}

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self._normal), default=0)

    @cached_property
    def _always(self) -> list[str]:
        """Tokens that take part whatever the text: added tokens, bytes, the unknown token."""
        vocabulary = self._vocabulary
        return [vocabulary.tokens[index] for index in vocabulary.of_type(UNKNOWN, CONTROL, USER_DEFINED, BYTE)]

    def _build(self, tokens: set[str]) -> Pipeline:
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

    @cached_property
    def pipeline(self) -> Pipeline:
        """The whole tokenizer, without decoder and post-processor."""
        return self._build(self._normal)

    def _occurring(self, text: str) -> set[str]:
        """The normal tokens that are somewhere in the text: merging can reach no other."""
        text = text.replace(" ", SPACE)
        longest, normal = self._longest, self._normal
        parts = {
            text[start:end]
            for start in range(len(text))
            for end in range(start + 1, min(start + longest, len(text)) + 1)
        }
        if self.space_prefix:  # a prefix may come before any part, since each added token starts anew
            parts |= {SPACE + part for part in parts} | {SPACE}
        return normal & parts

    def encode(self, text: str, parse_special: bool) -> list[int]:
        with self._lock:
            self._cost += _COST_OF_SMALL_MODEL + len(text)
            small = self._cost <= _COST_OF_WHOLE_MODEL
            return _encode(self._build(self._occurring(text)) if small else self.pipeline, text, parse_special)


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

"""The tokens of a GGUF file: texts, types, scores and merges, each checked before it is used."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn

from gguf import TokenType

from turbosparse.errors import UserError
from turbosparse.model.gguf import GGUFFile

SPACE = "▁"  # SentencePiece writes a space so
MAX_TOKENS = 1 << 21
MAX_TOKEN_CHARACTERS = 1024  # all cuts of a token are looked at, so a long one would cost its square
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = (
    int(kind)
    for kind in (
        TokenType.NORMAL,
        TokenType.UNKNOWN,
        TokenType.CONTROL,
        TokenType.USER_DEFINED,
        TokenType.UNUSED,
        TokenType.BYTE,
    )
)


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of one file, indexed by id.

    Attributes:
        source: the file's name, for messages.
        model: "gpt2" (byte-level BPE) or "llama" (SentencePiece BPE).
        tokens, types: text and `TokenType` of every id.
        scores: one a token for "llama"; the higher the score of a merged token, the earlier the merge. Else empty.
        merges: pairs of token texts, first merge first. Always there for "gpt2"; for "llama" they go before the scores.
    """

    source: str
    model: str
    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[tuple[str, str]]

    @classmethod
    def from_gguf(cls, file: GGUFFile) -> Vocabulary:
        """Read and check the `tokenizer.ggml.*` arrays.

        Raises:
            UserError: no tokenizer, one of another kind, or arrays that do not fit together.
        """
        source, metadata = str(file.path), file.metadata
        model = metadata.get("tokenizer.ggml.model")
        if model not in ("gpt2", "llama"):
            _fail(source, "model", f"is {str(model)[:40]!r}; gpt2 (byte-level BPE) and llama (SentencePiece) are read")
        tokens = list(_list(source, metadata, "tokens", str))
        if not 0 < len(tokens) <= MAX_TOKENS:
            _fail(source, "tokens", f"has {len(tokens)} entries, not 1 to {MAX_TOKENS}")
        if max(map(len, tokens)) > MAX_TOKEN_CHARACTERS:
            _fail(source, "tokens", f"has a token of more than {MAX_TOKEN_CHARACTERS} characters")
        count = len(tokens)
        types = _list(source, metadata, "token_type", int, count, default=[NORMAL] * count)
        if not set(types) <= set(range(NORMAL, BYTE + 1)):
            _fail(source, "token_type", f"has a type outside {NORMAL} to {BYTE}")
        merges = [_pair(source, merge) for merge in _list(source, metadata, "merges", str, default=[])]
        if len(merges) > 8 * MAX_TOKENS:
            _fail(source, "merges", f"has {len(merges)} entries")
        scores: list[float] = []
        if model == "llama":
            # They are searched in the text itself, where a space is a space. Some writers keep SentencePiece's mark.
            for index, kind in enumerate(types):
                if kind == USER_DEFINED:
                    tokens[index] = tokens[index].replace(SPACE, " ")
            scores = _list(source, metadata, "scores", float, count, default=None if not merges else [0.0] * count)
            if not all(map(math.isfinite, scores)):
                _fail(source, "scores", "has an entry that is not a finite number")
        elif not merges and count > 256 + types.count(CONTROL):
            _fail(source, "merges", "is missing, so text cannot be cut into tokens")
        return cls(source, str(model), tokens, types, scores, merges)

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def ids(self) -> dict[str, int]:
        """Id of each token text; of equal texts the last one, as in llama.cpp."""
        return {token: index for index, token in enumerate(self.tokens)}

    def of_type(self, *kinds: int) -> list[int]:
        """Ids of all tokens of these types, ascending."""
        wanted = frozenset(kinds)
        return [index for index, kind in enumerate(self.types) if kind in wanted]

    def piece(self, index: int) -> bytes:
        """The bytes that a token stands for."""
        token, kind = self.tokens[index], self.types[index]
        if kind == BYTE:
            return _byte_value(token)
        if self.model == "llama":
            return token.replace(SPACE, " ").encode()
        if kind in (NORMAL, UNUSED):
            return b"".join(_BYTE_OF.get(character) or character.encode() for character in token)
        return token.encode()


def merges_from_scores(vocabulary: Vocabulary, tokens: Iterable[str]) -> list[tuple[str, str]]:
    """Merges that build `tokens` out of pairs of them, best score first (SentencePiece's BPE order).

    Every way to cut a token into two others is a merge. Ties, which are cuts of one token, go by the ids of the parts,
    which is how Hugging Face's converter orders them.
    """
    known = tokens if isinstance(tokens, set) else set(tokens)
    ids, scores = vocabulary.ids, vocabulary.scores
    found = []
    for token in known:
        for cut in range(1, len(token)):
            left = token[:cut]
            if left in known and (right := token[cut:]) in known:
                found.append((-scores[ids[token]], ids[left], ids[right]))
    found.sort()
    texts = vocabulary.tokens
    return [(texts[left], texts[right]) for _, left, right in found]


def byte_characters() -> dict[int, str]:
    """GPT-2's printable character for each byte: itself where it prints, else the next one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


_BYTE_OF = {character: bytes([byte]) for byte, character in byte_characters().items()}


def _byte_value(token: str) -> bytes:
    """The byte of a token such as <0x0A>."""
    try:
        return bytes([int(token[3:-1], 16)])
    except ValueError:
        return token.encode()


def _fail(source: str, key: str, problem: str) -> NoReturn:
    raise UserError(f"{source} has no usable tokenizer: tokenizer.ggml.{key} {problem}.")


def _list(
    source: str, metadata: dict[str, Any], key: str, kind: type, count: int | None = None, default: Any = None
) -> Any:
    """An array of one element type, `count` long where that is given."""
    values = metadata.get(f"tokenizer.ggml.{key}", default)
    if values is None:
        _fail(source, key, "is missing")
    if not isinstance(values, list) or (values and type(values[0]) is not kind):
        _fail(source, key, f"is not an array of {kind.__name__}")
    if count is not None and len(values) != count:
        _fail(source, key, f"has {len(values)} entries for {count} tokens")
    return values


def _pair(source: str, merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    if not left or not right:
        _fail(source, "merges", f"has the entry {merge[:40]!r}, which is not two tokens and a space")
    return left, right

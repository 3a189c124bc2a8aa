"""The tokenizer of a Hugging Face folder as GGUF metadata.

Everything is read from JSON; nothing of the folder is executed. What GGUF cannot say is an error, never an
approximation: a model whose tokenizer differs a little works a little worse, and nobody sees why.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from gguf import TokenType

from turbosparse.errors import UserError
from turbosparse.model import pretokenizers
from turbosparse.model.pretokenizers import flat_parts
from turbosparse.model.vocabulary import MAX_TOKENS, SPACE, Vocabulary, merges_from_scores

MAX_FILE_BYTES = 1 << 28
_BYTE_TOKENS = frozenset(f"<0x{byte:02X}>" for byte in range(256))
_IDS = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}


def tokenizer_metadata(hf_dir: str | Path) -> dict[str, Any]:
    """GGUF keys (`tokenizer.ggml.*`, `tokenizer.chat_template`) for the tokenizer of a folder.

    Reads tokenizer.json and config.json, and where they are there tokenizer_config.json, special_tokens_map.json,
    generation_config.json and chat_template.jinja. The vocabulary is filled up to the model's `vocab_size` with unused
    tokens `[PAD<id>]`.

    Returns:
        key to int, bool, str or list; token types are ints, scores are floats.

    Raises:
        UserError: a file is missing or is not what it should be, or the tokenizer is of a kind that GGUF cannot hold.
    """
    folder = _Folder(Path(hf_dir))
    spec = folder.json("tokenizer.json", required=True)
    model = spec.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE" or not isinstance(model.get("vocab"), dict):
        folder.fail("tokenizer.json is not a BPE tokenizer; only BPE models can be exported")
    pre_tokenizer = flat_parts(spec.get("pre_tokenizer"), "pretokenizers")
    sentencepiece = not any(part.get("type") == "ByteLevel" for part in pre_tokenizer)
    if sentencepiece and not model.get("byte_fallback"):
        folder.fail("tokenizer.json is neither byte-level BPE nor SentencePiece BPE with byte fallback")
    tokens, types = _tokens(folder, spec, sentencepiece)
    ids = {token: index for index, token in enumerate(tokens)}
    merges = _merges(folder, model)
    metadata: dict[str, Any] = {"tokenizer.ggml.model": "llama" if sentencepiece else "gpt2"}
    if sentencepiece:
        metadata["tokenizer.ggml.pre"] = "default"
        metadata["tokenizer.ggml.add_space_prefix"] = _space_prefix(folder, spec)
    else:
        name = pretokenizers.detect(spec)
        if name is None:
            names = ", ".join(sorted(pretokenizers.PRE_TOKENIZERS))
            folder.fail(f"the pre_tokenizer of tokenizer.json is none of those that GGUF has a name for ({names})")
        metadata["tokenizer.ggml.pre"] = name
    metadata["tokenizer.ggml.tokens"] = tokens
    metadata["tokenizer.ggml.token_type"] = types
    if sentencepiece:
        scores = _scores(tokens, merges)
        metadata["tokenizer.ggml.scores"] = scores
        if not _scores_give(tokens, types, scores, merges):
            metadata["tokenizer.ggml.merges"] = [f"{left} {right}" for left, right in merges]
    else:
        metadata["tokenizer.ggml.merges"] = [f"{left} {right}" for left, right in merges]
    metadata |= _special_ids(folder, ids, spec)
    template = folder.chat_template()
    if template is not None:
        metadata["tokenizer.chat_template"] = template
    _check_texts(folder, metadata)
    return metadata


@dataclass(frozen=True)
class _Folder:
    path: Path

    def fail(self, problem: str) -> NoReturn:
        raise UserError(f"{self.path}: {problem}.")

    def text(self, name: str) -> str | None:
        file = self.path / name
        if not file.is_file():
            return None
        if file.stat().st_size > MAX_FILE_BYTES:
            self.fail(f"{name} is larger than {MAX_FILE_BYTES >> 20} MiB")
        try:
            return file.read_text("utf-8")
        except (OSError, UnicodeDecodeError):
            self.fail(f"{name} cannot be read as UTF-8 text")

    def json(self, name: str, required: bool = False) -> dict[str, Any]:
        """An object; {} where the file is missing and not required."""
        text = self.text(name)
        if text is None:
            if required:
                self.fail(f"{name} is missing; save the tokenizer there with transformers' `save_pretrained`")
            return {}
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            self.fail(f"{name} is not a JSON object")
        return value

    def chat_template(self) -> str | None:
        """chat_template.jinja, else the (default) template of tokenizer_config.json."""
        text = self.text("chat_template.jinja")
        if text is not None:
            return text
        template = self.json("tokenizer_config.json").get("chat_template")
        if isinstance(template, list):  # older folders: [{"name": "default", "template": ...}, ...]
            named = [_inner(item, "template") for item in template if _inner(item, "name") == "default"]
            template = named[-1] if named else None
        return template if isinstance(template, str) else None

    def vocab_size(self) -> int:
        config = self.json("config.json", required=True)
        inner = config.get("text_config")
        size = config.get("vocab_size", inner.get("vocab_size") if isinstance(inner, dict) else None)
        if isinstance(size, bool) or not isinstance(size, int) or not 0 < size <= MAX_TOKENS:
            self.fail(f"vocab_size of config.json is {str(size)[:40]}, not 1 to {MAX_TOKENS}")
        return size


def _tokens(folder: _Folder, spec: dict[str, Any], sentencepiece: bool) -> tuple[list[str], list[int]]:
    """Text and type of every id up to the model's vocab_size."""
    size = folder.vocab_size()
    tokens = [f"[PAD{index}]" for index in range(size)]
    types = [int(TokenType.UNUSED)] * size

    def put(token: object, index: object, kind: TokenType) -> None:
        if not isinstance(token, str) or type(index) is not int:
            folder.fail("tokenizer.json has a token that is not a text with an id")
        if not 0 <= index < size:
            folder.fail(f"tokenizer.json gives the token {token[:40]!r} the id {index}; the model has {size} tokens")
        tokens[index], types[index] = token, int(kind)

    for token, index in spec["model"]["vocab"].items():
        is_byte = sentencepiece and token in _BYTE_TOKENS
        put(token, index, TokenType.BYTE if is_byte else TokenType.NORMAL)
    added = spec.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(entry, dict) for entry in added):
        folder.fail("added_tokens of tokenizer.json is not a list of objects")
    unknown = spec["model"].get("unk_token") if sentencepiece else None
    for entry in added:
        kind = TokenType.CONTROL if entry.get("special") else TokenType.USER_DEFINED
        token = entry.get("content")
        put(token, entry.get("id"), TokenType.UNKNOWN if token == unknown else kind)
    return tokens, types


def _merges(folder: _Folder, model: dict[str, Any]) -> list[tuple[str, str]]:
    """Pairs, from either of the two ways to write them: "a b" and ["a", "b"]."""
    merges: list[tuple[str, str]] = []
    entries = model.get("merges")
    for entry in entries if isinstance(entries, list) else [None]:
        parts = entry.split(" ") if isinstance(entry, str) else entry
        if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(p, str) and p for p in parts):
            folder.fail(f"tokenizer.json has the merge {str(entry)[:40]!r}, which is not a pair of tokens")
        merges.append((parts[0], parts[1]))
    return merges


def _scores(tokens: list[str], merges: list[tuple[str, str]]) -> list[float]:
    """Minus the rank of the first merge that builds each token; float32 holds them exactly (ranks < 2^24)."""
    rank: dict[str, int] = {}
    for index, (left, right) in enumerate(merges):
        rank.setdefault(left + right, index)
    last = len(merges)
    return [-float(rank.get(token, last)) for token in tokens]


def _scores_give(tokens: list[str], types: list[int], scores: list[float], merges: list[tuple[str, str]]) -> bool:
    """Whether a reader that only has the scores finds these merges in this order."""
    vocabulary = Vocabulary("", "llama", tokens, types, scores, [])
    normal = {tokens[index] for index in vocabulary.of_type(int(TokenType.NORMAL))}
    # Merges that touch added tokens never take part: added tokens are cut out of the text before.
    wanted = [(a, b) for a, b in merges if a in normal and b in normal and a + b in normal]
    return merges_from_scores(vocabulary, normal) == wanted


def _space_prefix(folder: _Folder, spec: dict[str, Any]) -> bool:
    """Whether a SentencePiece tokenizer puts a space in front; anything but the known forms is an error."""
    prefix = False
    for part in flat_parts(spec.get("normalizer"), "normalizers"):
        if part.get("type") == "Prepend" and part.get("prepend") == SPACE:
            prefix = True
        elif part.get("type") != "Replace" or part.get("content") != SPACE:
            folder.fail(f"the normalizer {str(part.get('type'))[:40]} of tokenizer.json cannot be written to GGUF")
    for part in flat_parts(spec.get("pre_tokenizer"), "pretokenizers"):
        if part.get("type") == "Metaspace":
            prefix = prefix or part.get("prepend_scheme", "always") != "never"
        elif part.get("type") != "Split" or part.get("pattern") != {"String": " "}:
            # Gemma splits at spaces that its normalizer has already replaced, which does nothing.
            folder.fail(f"the pre-tokenizer {str(part.get('type'))[:40]} of tokenizer.json cannot be written to GGUF")
    return prefix


def _special_ids(folder: _Folder, ids: dict[str, int], spec: dict[str, Any]) -> dict[str, Any]:
    config = folder.json("special_tokens_map.json") | folder.json("tokenizer_config.json")
    found: dict[str, Any] = {}
    for name, key in _IDS.items():
        token = config.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and token in ids:
            found[f"tokenizer.ggml.{name}_token_id"] = ids[token]
    bos = found.get("tokenizer.ggml.bos_token_id")
    if bos is not None:
        stated = config.get("add_bos_token")
        add_bos = stated if isinstance(stated, bool) else _template_adds(spec.get("post_processor"), bos)
        found["tokenizer.ggml.add_bos_token"] = add_bos
    # A generation may end with more tokens than EOS, an instruction model's with its end of turn above all.
    ends = folder.json("generation_config.json").get("eos_token_id", folder.json("config.json").get("eos_token_id"))
    ends = ends if isinstance(ends, list) else [ends]
    ends = [end for end in ends if type(end) is int and 0 <= end < len(ids)]
    names = ("eos", "eot", "eom")
    known = found.get("tokenizer.ggml.eos_token_id")
    ordered = list(dict.fromkeys([*([known] if known is not None else []), *ends]))
    return found | {f"tokenizer.ggml.{name}_token_id": end for name, end in zip(names, ordered, strict=False)}


def _template_adds(post_processor: Any, bos: int) -> bool:
    """Whether a post-processor of tokenizer.json puts `bos` in front of a single text."""
    for part in flat_parts(post_processor, "processors"):
        single = part.get("single")
        if part.get("type") != "TemplateProcessing" or not isinstance(single, list) or not single:
            continue
        special = _inner(_inner(single[0], "SpecialToken"), "id")
        ids = _inner(_inner(part.get("special_tokens"), special), "ids")
        if isinstance(ids, list) and bos in ids:
            return True
    return False


def _check_texts(folder: _Folder, metadata: dict[str, Any]) -> None:
    """JSON can name half a surrogate pair, which is no text that a file can hold."""
    for key, value in metadata.items():
        texts = [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
        try:
            "".join(texts).encode()
        except UnicodeEncodeError:
            folder.fail(f"its {key} would hold half a surrogate pair, which is no text; save the tokenizer again")


def _inner(value: Any, key: Any) -> Any:
    """What a JSON value holds under `key`; None where it is no object, or `key` no name in it."""
    return value.get(key) if isinstance(value, dict) and isinstance(key, str) else None

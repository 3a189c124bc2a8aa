"""Training text as token windows: a mixture of domains whose sample i depends on nothing but the seed and i.

Each source is tokenised once into a flat file of token ids (documents joined by EOS) and mapped from disk. Sample i of
the mixture is a pure function of (seed, i), so a run that resumes at sample i sees exactly what it would have seen,
without any state of an iterator to save.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from turbosparse.documents import read_records
from turbosparse.errors import UserError
from turbosparse.relufy.recipes import Data, TextSource

_DOCUMENTS_PER_BATCH = 512


def _files(source: TextSource) -> list[Path]:
    files = [Path(name) for name in sorted(glob.glob(source.path or ""))]
    if not files:
        raise UserError(f"{source.path}: no such training text; the recipe's `path` must match at least one file")
    return files


def check_sources(data: Data) -> None:
    """Check that every local source is there, before a run spends its time on the first of them.

    Raises:
        UserError: a `path` matches no file.
    """
    for source in (*data.sources, *data.validation):
        if source.path is not None:
            _files(source)


def _texts(source: TextSource, tokenizer: Any) -> Iterator[str]:
    """Documents of a source; a record with `messages` is rendered with the tokenizer's chat template."""
    if source.dataset is not None:
        import datasets

        rows = datasets.load_dataset(source.dataset, source.subset, split=source.split, streaming=True)
        yield from (row[source.text_field] for row in rows)
        return
    for file in _files(source):
        for record in read_records(file, source.text_field):
            if "messages" in record:
                yield tokenizer.apply_chat_template(record["messages"], tokenize=False)
            else:
                yield record[source.text_field]


def _fingerprint(source: TextSource, tokenizer: Any) -> str:
    """A name for the tokenised source that changes with its content and with the tokenizer, not with the machine."""
    digest = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode())
    digest.update(
        f"{tokenizer.eos_token_id} {tokenizer.chat_template} {source.max_tokens} {source.text_field}".encode()
    )
    if source.dataset is not None:
        digest.update(f"{source.dataset} {source.subset} {source.split}".encode())
    else:
        for file in _files(source):
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:20]


def _batches(items: Iterable[str], size: int) -> Iterator[list[str]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def tokenize(source: TextSource, tokenizer: Any, cache: Path) -> npt.NDArray[np.integer[Any]]:
    """Token ids of a source, [tokens], uint16 or uint32, mapped read-only from `cache` (written on first use).

    Raises:
        UserError: no file matches, a file is not what it says, or the source holds no text.
    """
    # What a fine-tuning left in tokenizer.json would cut every document, or fill it up with padding.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32)
    path = cache / f"{source.domain}-{_fingerprint(source, tokenizer)}.{dtype.name}"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        limit = source.max_tokens or 1 << 62
        written = 0
        try:
            with partial.open("wb") as out:
                for batch in _batches(_texts(source, tokenizer), _DOCUMENTS_PER_BATCH):
                    encodings = tokenizer.backend_tokenizer.encode_batch_fast(batch, add_special_tokens=False)
                    for encoding in encodings:
                        ids = np.array([*encoding.ids, tokenizer.eos_token_id], dtype=dtype)[: limit - written]
                        out.write(ids.tobytes())
                        written += ids.size
                    if written >= limit:
                        break
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    if path.stat().st_size == 0:
        raise UserError(f"{source.path or source.dataset}: holds no text; check the files and `text_field`")
    return np.memmap(path, dtype=dtype, mode="r")


class Mixture(Dataset[dict[str, Any]]):
    """`n_samples` windows of `context` tokens, drawn from several sources by weight.

    Within a source every epoch visits every window once, in a new order and from a new starting offset, so that a
    second epoch cuts the text elsewhere. Items: {"input_ids": int64 [context], "domain": int, the index of the source}.
    """

    def __init__(
        self,
        sources: Sequence[npt.NDArray[np.integer[Any]]],
        weights: Sequence[float],
        context: int,
        n_samples: int,
        seed: int,
    ) -> None:
        if any(source.size < 2 * context for source in sources):
            raise UserError(f"a training source holds less than two windows of {context} tokens; add text to it")
        self._sources, self._context, self._seed = sources, context, seed
        probabilities = np.asarray(weights, dtype=np.float64) / np.sum(weights)
        self._source_of = np.random.default_rng([seed, 0]).choice(len(sources), size=n_samples, p=probabilities)
        self._rank = np.zeros(n_samples, dtype=np.int64)  # how many earlier samples came from the same source
        for index in range(len(sources)):
            mine = self._source_of == index
            self._rank[mine] = np.arange(np.count_nonzero(mine))
        self._epochs: dict[tuple[int, int], tuple[int, npt.NDArray[np.int64]]] = {}

    def _epoch(self, source: int, epoch: int) -> tuple[int, npt.NDArray[np.int64]]:
        key = (source, epoch)
        if key not in self._epochs:
            rng = np.random.default_rng([self._seed, 1, source, epoch])
            windows = self._sources[source].size // self._context - 1
            self._epochs[key] = (int(rng.integers(self._context)), rng.permutation(windows))
        return self._epochs[key]

    def __len__(self) -> int:
        return len(self._source_of)

    def __getitem__(self, index: int) -> dict[str, Any]:
        source = int(self._source_of[index])
        windows = self._sources[source].size // self._context - 1
        epoch, position = divmod(int(self._rank[index]), windows)
        offset, order = self._epoch(source, epoch)
        start = offset + int(order[position]) * self._context
        ids = self._sources[source][start : start + self._context].astype(np.int64)
        return {"input_ids": torch.from_numpy(ids), "domain": source}


def build_mixture(
    sources: Sequence[TextSource], tokenizer: Any, cache: Path, context: int, n_samples: int, seed: int
) -> Mixture:
    """Tokenise (or map) every source and mix them by weight."""
    tokens = [tokenize(source, tokenizer, cache) for source in sources]
    return Mixture(tokens, [source.weight for source in sources], context, n_samples, seed)


def validation_windows(source: TextSource, tokenizer: Any, cache: Path, context: int) -> torch.Tensor:
    """Windows side by side over a held-out source, int64 [windows, context]; the tail shorter than one is left out."""
    tokens = tokenize(source, tokenizer, cache)
    count = tokens.size // context
    if count == 0:
        raise UserError(f"{source.path or source.dataset}: less than one window of {context} tokens to validate on")
    return torch.from_numpy(np.asarray(tokens[: count * context], dtype=np.int64).reshape(count, context))

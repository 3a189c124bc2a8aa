"""A Hugging Face folder, as lm-evaluation-harness sees a language model: its own HFLM, with our progress."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lm_eval.models.huggingface import HFLM
from transformers.utils import logging as transformers_logging

from turbosparse.evaluate.harness import tokens_to_write
from turbosparse.folders import load_folder

_BATCHES = 16  # between two reports; requests of one length stay together, so that little is padded


class FolderLM(HFLM):
    """The harness's own adapter; it is handed the requests in portions, longest first, and we report after each."""

    def __init__(self, folder: str | Path, dtype: str = "float32", batch: int = 8) -> None:
        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()
        tokenizer, model = load_folder(folder, dtype)
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=batch,
            softmax_dtype="float32",  # sums of log-probabilities in bfloat16 would tie
        )
        self.progress: Callable[[int, int], None] = lambda _done, _total: None

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm)

    def _loglikelihood_tokens(self, requests: Sequence[Any], disable_tqdm: bool = True, **options: Any) -> list[Any]:
        answer = super()._loglikelihood_tokens
        return self._in_portions(
            requests,
            lambda request: (-len(request[1]) - len(request[2]), request[1]),  # the answers of a question side by side
            lambda portion: answer(portion, disable_tqdm=True, **options),
        )

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        for request in requests:
            tokens_to_write(request.args[1], self.max_length)
        answer = super().generate_until
        return self._in_portions(
            requests, lambda request: -len(request.args[0]), lambda portion: answer(portion, disable_tqdm=True)
        )

    def _in_portions(
        self, requests: Sequence[Any], key: Callable[[Any], Any], answer: Callable[[list[Any]], list[Any]]
    ) -> list[Any]:
        order = sorted(range(len(requests)), key=lambda index: key(requests[index]))
        results: list[Any] = [None] * len(requests)
        size = _BATCHES * self.batch_size
        for start in range(0, len(order), size):
            portion = order[start : start + size]
            for index, result in zip(portion, answer([requests[index] for index in portion]), strict=True):
                results[index] = result
            self.progress(start + len(portion), len(order))
        return results

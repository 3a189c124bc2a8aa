"""A GGUF model in our engine, as lm-evaluation-harness sees a language model.

Requests are answered in the order of their tokens, and the cache keeps what a request shares with the one before: the
answers of one question, and questions with the same solved examples, read these once. Keeping changes no bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from turbosparse.engine.generate import generate
from turbosparse.errors import UserError
from turbosparse.evaluate.harness import tokens_to_write
from turbosparse.evaluate.perplexity import negative_log_likelihoods

if TYPE_CHECKING:
    from turbosparse.engine import Engine

Pair = tuple[list[int], list[int]]


class EngineLM(TemplateLM):
    """The engine in one mode. As with the harness's own models, what does not fit the context loses its beginning."""

    def __init__(self, engine: Engine, mode: str) -> None:
        super().__init__()
        self._engine, self._mode = engine, mode
        self.max_length = engine.config.context_length
        self.progress: Callable[[int, int], None] = lambda _done, _total: None

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text.

        Raises:
            UserError: the model names none.
        """
        if (eos := self._engine.tokenizer.eos_id) is None:
            raise UserError(f"{self._engine.tokenizer.source} names no end-of-text token, which this task needs.")
        return eos

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it."""
        bos = self._engine.tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Control tokens that are written out are taken for themselves, as transformers does."""
        return self._engine.tokenizer.encode(string, add_bos=add_special_tokens, parse_special=True)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm)

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any) -> list[Any]:
        """(log-likelihood, whether greedy decoding would write it) of every answer after its context."""
        pairs = [self._fitting(context, answer) for _, context, answer in requests]
        results: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        session = self._engine.session(max(len(context) + len(answer) - 1 for context, answer in pairs))
        order = sorted(range(len(pairs)), key=pairs.__getitem__)
        done = 0
        for context, same in groupby(order, key=lambda index: pairs[index][0]):
            first = session.prefill(context[session.keep_prefix(context) :], self._mode)
            for index in same:
                answer = pairs[index][1]
                if session.truncate(len(context)) < len(context):
                    session.prefill(context, self._mode)
                rows = [first[None]]
                if len(answer) > 1:
                    rows.append(session.logits(answer[:-1], self._mode))
                results[index] = _likelihood(np.concatenate(rows), answer)
                done += 1
            self.progress(done, len(pairs))
        return results

    def _fitting(self, context: list[int], answer: list[int]) -> Pair:
        """The pair with the context's beginning cut off where both do not fit; the last token is never read."""
        room = self.max_length + 1 - len(answer)
        if room < 1:
            raise UserError(
                f"an answer of {len(answer)} tokens does not fit the model's context of {self.max_length}; leave the "
                "task out."
            )
        return context[-room:], answer

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood of whole texts, in windows side by side."""
        pieces: list[tuple[None, list[int], list[int]]] = []
        counts = []
        for text in (request.args[0] for request in requests):
            windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            mine = [(None, *make_disjoint_window(window)) for window in windows]
            pieces += mine
            counts.append(len(mine))
        values = iter(self._loglikelihood_tokens(pieces) if pieces else ())
        return [sum(next(values)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """What greedy decoding writes after every context, up to a stop string."""
        tasks = []
        for index, (context, options) in enumerate(request.args for request in requests):
            if options.get("do_sample"):
                raise ValueError("sampled answers are not supported: the tasks that we offer are greedy")
            new = tokens_to_write(options, self.max_length)
            until = options.get("until") or []
            stop = [until] if isinstance(until, str) else until
            tasks.append((self.tok_encode(context)[-(self.max_length - new) :], new, [s for s in stop if s], index))
        session = self._engine.session(max(len(prompt) + new for prompt, new, _, _ in tasks))
        texts = [""] * len(tasks)
        for done, (prompt, new, stop, index) in enumerate(sorted(tasks), start=1):
            rest = prompt[session.keep_prefix(prompt) :]
            chunks = generate(self._engine, rest, None, new, self._mode, stop, session=session)
            texts[index] = "".join(chunk.text for chunk in chunks)
            self.progress(done, len(tasks))
        return texts


def _likelihood(rows_NV: npt.NDArray[np.float32], answer: Sequence[int]) -> tuple[float, bool]:
    nats = float(negative_log_likelihoods(rows_NV, answer).sum())
    return -nats, bool((rows_NV.argmax(axis=1) == np.asarray(answer)).all())

"""Make a small chat set out of a corpus: questions about articles, word problems, Python functions, with their answers.

    python make_chat.py CORPUS_DIR OUT.jsonl

Reads CORPUS_DIR/{web,math,code}/*.jsonl.zst and keeps what answers a question by itself: the first sentences of
encyclopedia articles (records whose source names a wiki), grade-school word problems ("Question: ... Answer: ...") and
short Python functions whose docstring says what they do. Each line of OUT.jsonl is {"messages": [...], "source": ...},
as `turbosparse train` reads it.
"""

from __future__ import annotations

import ast
import json
import os
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

from turbosparse.documents import read_records

_ABOUT = ["What is {}?", "Tell me about {}.", "Can you explain {}?", "I want to know about {}.", "{}: what is it?"]
_WHO = ["Who is {}?", "Tell me about {}.", "Who was {}?", "I would like to know about {}."]
_WRITE = [
    "Write a Python function `{}`. {}",
    "{1} Write that as a Python function called `{0}`.",
    "How do I write this in Python? {1} Call the function `{0}`.",
]
_SENTENCE_END = re.compile(r"(?<=[a-z)\]\"\u2019%0-9]{2}[.!?])\s+(?=[A-Z])")
_PERSON = re.compile(r"\((?:born|[^)]*\d{3,4}\s*[\u2013-])|\bwas an? [a-z-]+ [a-z]+,? who\b")


def _article(text: str, index: int) -> tuple[str, str] | None:
    title, _, body = text.partition("\n\n")
    sentences = _SENTENCE_END.split(body.strip())
    answer = " ".join(sentences[:3]).strip()
    if len(title) > 60 or not 60 <= len(answer) <= 700 or "\n" in answer or not answer.endswith((".", "!", "?")):
        return None
    templates = _WHO if _PERSON.search(sentences[0]) else _ABOUT
    return templates[index % len(templates)].format(title), answer


def _word_problem(text: str) -> tuple[str, str] | None:
    match = re.fullmatch(r"Question: (.+?)\s+Answer: (.+?)\s+#### (\S+)\s*", text, re.DOTALL)
    return (match[1], f"{match[2]}\nThe answer is {match[3]}.") if match else None


def _functions(text: str) -> Iterator[tuple[str, str]]:
    """Top-level functions of a Python file that their docstring's first paragraph asks for."""
    try:
        with warnings.catch_warnings(action="ignore"):  # about the file's own string escapes
            body = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError):
        return
    for index, node in enumerate(body):
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("_") or node.decorator_list:
            continue
        wish = " ".join((ast.get_docstring(node) or "").partition("\n\n")[0].split())
        if not 30 <= len(wish) <= 200 or not wish.endswith("."):
            continue
        source = ast.get_source_segment(text, node) or ""
        if 120 <= len(source) <= 1200:
            yield _WRITE[index % len(_WRITE)].format(node.name, wish), f"```python\n{source}\n```"


def _chat(question: str, answer: str, source: str) -> dict[str, object]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "source": source}


def chats(corpus: Path) -> Iterator[dict[str, object]]:
    """Question and answer pairs as chat records, in corpus order."""
    for file in sorted([*corpus.glob("web/*.jsonl.zst"), *corpus.glob("math/*.jsonl.zst")]):
        for index, record in enumerate(read_records(file)):
            source = record["source"]
            pair = None
            if "wiki" in source:
                pair = _article(record["text"], index)
            elif "grade-school-math" in source:
                pair = _word_problem(record["text"])
            if pair:
                yield _chat(*pair, source)
    for file in sorted(corpus.glob("code/*.jsonl.zst")):
        for record in read_records(file):
            for question, answer in _functions(record["text"]):
                yield _chat(question, answer, record["source"])


def main() -> None:
    """Write the set to a temporary name, then rename it."""
    corpus, out = Path(sys.argv[1]), Path(sys.argv[2])
    partial = out.with_name(out.name + ".partial")
    count = 0
    with partial.open("w", encoding="utf-8") as stream:
        for record in chats(corpus):
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")
            count += 1
    os.replace(partial, out)
    print(f"{out}: {count} conversations")


if __name__ == "__main__":
    main()

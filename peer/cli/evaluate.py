"""`peer evaluate`: how good a model's answers are, on files of questions and answers.

The model is this machine's newest checkpoint, or a folder that `export` (or anybody's
save_pretrained) wrote, with an adapter or without.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from peer.cli.ending import say
from peer.errors import DataError, StorageError, UsageError

if TYPE_CHECKING:
    import torch

    from peer.train.chat_format import ChatFormat
    from peer.train.scoring import Score
    from peer.train.tokens import Tokenizer

LENGTH: Final = 1024  # tokens in a sample, if the model has room for so many
REFUSED_SHOWN: Final = 5


@dataclass(frozen=True, kw_only=True)
class What:
    """What is evaluated, as the command line says it."""

    data: tuple[Path, ...]
    model: Path | None
    adapter: Path | None
    rows: int | None
    held_out: float | None
    tokens: int
    length: int | None
    home: Path | None
    seat: str | None
    run: str | None


@dataclass(frozen=True, slots=True)
class _Subject:
    """A model that can be asked."""

    name: str
    model: torch.nn.Module
    tokenizer: Tokenizer
    form: ChatFormat


def evaluate(what: What, as_json: bool) -> int:
    """Score the model on the files and print it.

    Raises:
        UsageError: options that don't go together.
        DataError: a file is missing, or holds no row that can be used.
        StorageError: there is no such model or adapter, or nothing was trained yet.
        ManifestError: the tokenizer's chat template can't be used.
        RunNotFoundError: this machine has no such run.
    """
    if what.adapter is not None and what.model is None:
        raise UsageError("--adapter needs --model, the folder of the model that it was made for")
    if what.model is not None and (what.run is not None or what.seat is not None):
        raise UsageError("--model names a folder, --run and --seat a checkpoint; take away one")
    from peer.manifest_toml import data_files

    files = data_files(what.data, "chat")
    with _subject(what) as subject:
        report = _evaluate(what, files, subject)
    if as_json:
        sys.stdout.write(json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    else:
        _show(report)
    return 0


@contextmanager
def _subject(what: What) -> Iterator[_Subject]:
    if what.model is not None:
        yield _folder(what.model, what.adapter)
        return
    from peer.cli.offline import find, load
    from peer.train import build_tokenizer
    from peer.train.chat_format import format_beside, plain

    place = find(what.home, what.seat, what.run)
    manifest, method, number = load(place)
    tokenizer = build_tokenizer(manifest, place.assets)
    form = format_beside(place.assets / "tokenizer" / "tokenizer.json") or plain(tokenizer)
    with method.outer_model() as model:
        yield _Subject(f"{manifest.name}, round {number}", model, tokenizer, form)


def _folder(folder: Path, adapter: Path | None) -> _Subject:
    from peer.train.models import load_adapter, load_folder
    from peer.train.template import format_of
    from peer.train.tokens import FileTokenizer

    file = folder / "tokenizer.json"
    if not file.is_file():
        raise StorageError(f"{folder}: no tokenizer.json there; name an exported folder")
    tokenizer = FileTokenizer(file)
    form = format_of(file, tokenizer)
    model = load_folder(folder)
    name = str(folder)
    if adapter is not None:
        model, name = load_adapter(model, adapter), f"{folder} with {adapter}"
    return _Subject(name, model, tokenizer, form)


def _evaluate(what: What, files: tuple[Path, ...], subject: _Subject) -> dict[str, Any]:
    from peer.train.chat import held_out
    from peer.train.rows import ChatRows
    from peer.train.sample import positions_of
    from peer.train.scoring import Score, score
    from peer.train.windows import Windows

    room = positions_of(subject.model)
    length = min(what.length or LENGTH, room)
    if what.tokens >= length:
        raise UsageError(f"--tokens {what.tokens} leaves no room in samples of {length} tokens")
    windows = Windows(subject.tokenizer, subject.form, length)
    rows = ChatRows(files, windows.check)
    chosen = held_out(rows, 1.0 if what.held_out is None else what.held_out)
    by_file: dict[Path, list[int]] = {}
    for row in chosen:  # by their hashes: the first of them are as good as drawn
        kept = by_file.setdefault(rows.file_of(row), [])
        if what.rows is None or len(kept) < what.rows:
            kept.append(row)
    tasks: dict[str, Score] = {}
    overall = Score()
    for file in (file for file in files if file in by_file):
        numbers = by_file[file]
        examples = rows.read(numbers)

        def refuse(index: int, why: str, numbers: list[int] = numbers) -> None:
            rows.refuse(rows.name(numbers[index]), why)

        scores = score(subject.model, windows, examples, answer_tokens=what.tokens, refuse=refuse)
        for example, found in zip(examples, scores, strict=True):
            task = tasks.setdefault(example.task or file.stem, Score())
            task += found
            overall += found
    if not overall.rows:
        raise DataError(f"{files[0]}: no row fits into {length} tokens; raise --length")
    return {
        "model": subject.name, "format": subject.form.name, "length": length,
        "files": len(files), "overall": overall.report(),
        "tasks": {name: task.report() for name, task in tasks.items()},
        "refused": {"count": rows.refused_count, "first": rows.refused},
    }  # fmt: skip


# ── for people ───────────────────────────────────────────────────────────────────────────
def _show(report: dict[str, Any]) -> None:
    from peer.observe.words import plural

    overall, tasks = report["overall"], report["tasks"]
    sys.stdout.write(
        f"{report['model']}: {plural(overall['rows'], 'row')} of {plural(report['files'], 'file')},"
        f" {report['format']} chat format, samples of {report['length']:,} tokens\n"
    )
    columns = ["rows", "tokens", "perplexity"]
    columns += ["exact_match"] if overall["asked"] else []
    columns += ["accuracy", "accuracy_per_byte"] if overall["questions"] else []
    lines = [*(tasks.items() if len(tasks) > 1 else ()), ("overall", overall)]
    width = max(len(name) for name, _ in lines)
    head = "".join(f"{column.replace('_', ' '):>19}" for column in columns)
    sys.stdout.write(f"{'':<{width}}{head}\n")
    for name, found in lines:
        cells = "".join(f"{_cell(column, found[column]):>19}" for column in columns)
        sys.stdout.write(f"{name:<{width}}{cells}\n")
    refused = report["refused"]
    for line in refused["first"][:REFUSED_SHOWN]:
        say(f"left out: {line}")
    if refused["count"] > REFUSED_SHOWN:
        say(f"left out: {plural(refused['count'], 'row')} in all")


def _cell(column: str, value: float | None) -> str:
    if value is None:
        return "-"
    if column in ("rows", "tokens"):
        return f"{value:,}"
    return f"{value:,.4g}" if column == "perplexity" else f"{value:.1%}"

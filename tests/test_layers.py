"""Imports point one way: bootstrap > peer > dht > protocols | tensorcodecs."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[1]
LAYERS = {
    "bootstrap": {"bootstrap", "peer", "dht", "protocols", "tensorcodecs"},
    "peer": {"peer", "dht", "protocols", "tensorcodecs"},
    "dht": {"dht", "protocols", "tensorcodecs"},
    "protocols": {"protocols"},
    "tensorcodecs": {"tensorcodecs"},
}
IMPURE = {"torch", "asyncio", "time", "random", "numpy", "socket", "threading", "os"}
MAY_IMPORT_HIVEMIND = {
    "dht/node.py",
    "dht/validator.py",
    "peer/net/daemon.py",
    "peer/net/libp2p.py",
    "peer/net/multiaddress.py",
}
UNSAFE = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


class Import(NamedTuple):
    where: str  # path:line
    layer: str
    module: str
    types_only: bool  # under `if TYPE_CHECKING`: nothing happens when the program runs

    @property
    def top(self) -> str:
        return self.module.partition(".")[0]


def walk(node: ast.AST, types_only: bool = False) -> Iterator[tuple[str, int, bool]]:
    if isinstance(node, ast.Import):
        yield from ((name.name, node.lineno, types_only) for name in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield node.module or "", node.lineno, types_only
    for child in ast.iter_child_nodes(node):
        guarded = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        yield from walk(child, types_only or guarded)


def imports(folder: str) -> list[Import]:
    base = ROOT / ("codecs" if folder == "tensorcodecs" else ".") / folder
    assert base.is_dir(), f"{folder} was looked for in the wrong place"
    return [
        Import(f"{path.relative_to(ROOT)}:{line}", folder, module, types_only)
        for path in sorted(base.rglob("*.py"))
        for module, line, types_only in walk(ast.parse(path.read_text()))
    ]


OURS = [found for layer in LAYERS for found in imports(layer)]
TESTS = imports("tests")


def refuse(found: list[Import], rule: str) -> None:
    assert not found, f"{rule}: " + ", ".join(f"{i.where} imports {i.module}" for i in found)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_knows_only_what_lies_beneath_it(layer: str) -> None:
    found = [i for i in OURS if i.layer == layer]
    above = {*LAYERS, "codecs", "tests"} - LAYERS[layer]
    refuse([i for i in found if i.top in above], f"{layer} is beneath these")


def test_protocols_are_pure() -> None:
    runs = [i for i in OURS if i.layer == "protocols" and not i.types_only]
    refuse([i for i in runs if i.top in IMPURE], "a machine has no clock, dice, threads or tensors")


def test_hivemind_stays_behind_five_files() -> None:
    found = [i for i in OURS if i.top == "hivemind"]
    refuse([i for i in found if i.where.rpartition(":")[0] not in MAY_IMPORT_HIVEMIND], "hivemind")


def test_only_training_knows_models() -> None:
    found = [i for i in OURS if i.top in ("transformers", "peft")]
    may = ("peer/train/", "peer/hook/callback.py:")  # which is called by transformers' own loop
    refuse([i for i in found if not i.where.startswith(may)], "peer/train alone")


def test_nothing_unpickles() -> None:
    refuse([i for i in OURS + TESTS if i.top in UNSAFE], "never")


def test_the_codecs_folder_is_no_package() -> None:
    assert not (ROOT / "codecs" / "__init__.py").exists(), "it would hide the standard library's"

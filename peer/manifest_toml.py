"""From the TOML file that a run's owner writes to a manifest and the files behind it.

Only here do paths on this machine appear. What the run needs from them is hashed and becomes
assets; the manifest itself keeps nothing but names and hashes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from peer.errors import DataError, ManifestError, StorageError
from peer.manifest import CONFIG_INTS, CONFIG_OTHERS, Asset, Manifest, load
from protocols import limits

DATA_ASSET_BYTES_MAX: Final = 16 * 2**20  # larger data is not shipped: each peer brings its own
DATA_SUFFIXES: Final[Mapping[str, tuple[str, ...]]] = {
    "text": (), "jsonl": (".jsonl", ".ndjson", ".json"), "parquet": (".parquet",),
    "chat": (".jsonl", ".ndjson", ".json"),
}  # fmt: skip
"""Which files of a folder are data; none named: all of them."""


Content = Path | bytes
"""An asset's: on disk, or made up here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """A manifest with what its owner has on disk for it."""

    manifest: Manifest
    files: dict[str, Content]
    """Asset name -> its bytes, or the local file with them."""
    data: tuple[Path, ...]
    """The owner's own data files (`data.paths` of the TOML), for `build_data`."""


def read_toml(text: str, folder: Path) -> Draft:
    """Read a run's TOML. Relative paths start at `folder`. Hashes the files it names.

    Raises:
        ManifestError: names the field and says what it must be.
        DataError: a data file or folder is missing or empty.
    """
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ManifestError(f"not TOML: {error}; correct that line and try again") from None
    if "assets" in raw:
        raise ManifestError("assets: is filled in by the program; take it out of the file")
    model, data, evaluation = (_table(raw, name) for name in ("model", "data", "evaluation"))
    files: dict[str, Content] = {}
    _take_model(model, folder, files)
    chat = data.get("source") == "chat" or bool(evaluation.get("paths"))
    _take_tokenizer(model, folder, files, chat=chat)
    own_data = _take_data(data, folder, files)
    _take_questions(evaluation, folder, files)
    raw["model"], raw["data"], raw["evaluation"] = model, data, evaluation
    raw["assets"] = [_asset(name, files[name]) for name in sorted(files)]
    return Draft(manifest=load(raw, lenient_numbers=True), files=files, data=own_data)


def stage_assets(files: Mapping[str, Content], folder: Path) -> None:
    """Put files under their asset names into `folder`, by hard link where that works.

    Raises:
        StorageError: the disk is full or not writable.
    """
    try:
        for name, source in files.items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(target.name + ".partial")
            partial.unlink(missing_ok=True)
            if isinstance(source, bytes):
                partial.write_bytes(source)
                partial.replace(target)
                continue
            try:
                os.link(source, partial)
            except OSError:  # another disk, or a file system without hard links
                shutil.copyfile(source, partial)
            partial.replace(target)
    except OSError as error:
        raise StorageError(
            f"can't write {folder}: {error.strerror}; free some space or choose another folder"
        ) from None


def data_files(paths: Iterable[Path], source: str) -> tuple[Path, ...]:
    """The files behind files and folders, in a fixed order. Hidden files are left out.

    Raises:
        DataError: one is missing, or there is nothing in a folder.
    """
    found: list[Path] = []
    suffixes = DATA_SUFFIXES.get(source, ())
    for path in paths:
        if path.is_dir():
            inside = sorted(
                file for file in path.rglob("*")
                if file.is_file()
                and not any(part.startswith(".") for part in file.relative_to(path).parts)
                and (not suffixes or file.suffix in suffixes)
            )  # fmt: skip
            if not inside:
                raise DataError(f"{path}: no {source} files in it; name another file or folder")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise DataError(f"{path}: no such file or folder; correct data.paths or --data")
    return tuple(found)


def _table(raw: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = raw.get(name, {})
    if not isinstance(value, dict):
        raise ManifestError(f"{name}: must be a table; write it as [{name}]")
    return dict(value)


def _text(table: dict[str, Any], section: str, key: str) -> str:
    value = table.pop(key)
    if not isinstance(value, str) or not value:
        raise ManifestError(f"{section}.{key}: must be a path (got {value!r}); correct it")
    return value


def _take_model(model: dict[str, Any], folder: Path, files: dict[str, Content]) -> None:
    """Replace `model.folder` by its config and its weights."""
    if "folder" not in model:
        return
    root = folder / _text(model, "model", "folder")
    if "config" in model:
        raise ManifestError("model.folder: has its own config; take out [model.config]")
    try:
        config = json.loads((root / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ManifestError(
            f"model.folder: can't read {root / 'config.json'} ({error}); name a folder that "
            "save_pretrained wrote"
        ) from None
    if not isinstance(config, dict) or "auto_map" in config or "quantization_config" in config:
        raise ManifestError(
            f"model.folder: {root} needs its own code or is quantised, which runs here don't "
            "accept; use a plain checkpoint"
        )
    # Whatever else checkpoints carry (dtype, versions, classifier labels) doesn't shape the model.
    model["config"] = {
        k: v for k, v in config.items()
        if (k in CONFIG_INTS or k in CONFIG_OTHERS) and v is not None
        and not (k.endswith("_token_id") and isinstance(v, list))
    }  # fmt: skip
    weights = sorted(root.glob("*.safetensors"))
    if not weights:
        raise ManifestError(
            f"model.folder: no .safetensors files in {root}; save the model with save_pretrained"
        )
    files.update({f"model/{file.name}": file for file in weights})
    index = root / "model.safetensors.index.json"
    if index.is_file():
        files[f"model/{index.name}"] = index
    if "tokenizer" not in model and (root / "tokenizer.json").is_file():
        model["tokenizer"] = str((root / "tokenizer.json").absolute())


def _take_tokenizer(
    model: dict[str, Any], folder: Path, files: dict[str, Content], *, chat: bool
) -> None:
    if model.get("tokenizer", "bytes") == "bytes":
        return
    path = folder / _text(model, "model", "tokenizer")
    if path.is_dir():
        path /= "tokenizer.json"
    if not path.is_file():
        raise ManifestError(f"model.tokenizer: {path} does not exist; name a tokenizer.json")
    files["tokenizer/tokenizer.json"] = path
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        if path.with_name(name).is_file():
            files[f"tokenizer/{name}"] = path.with_name(name)
    if chat:
        # The template is run here, on its owner's machine; joiners get what it amounts to.
        from peer.train.chat_format import FILE_NAME
        from peer.train.template import format_of
        from peer.train.tokens import FileTokenizer

        files[f"tokenizer/{FILE_NAME}"] = format_of(path, FileTokenizer(path)).to_json()
    model["tokenizer"] = "file"


def _take_data(data: dict[str, Any], folder: Path, files: dict[str, Content]) -> tuple[Path, ...]:
    """Replace `data.paths` by assets where the files are small; return the files themselves."""
    paths = data.pop("paths", [])
    if not isinstance(paths, list) or not all(isinstance(p, str) and p for p in paths):
        raise ManifestError(f"data.paths: must be a list of paths (got {paths!r}); correct it")
    source = data.get("source", "stdlib")
    if paths and source not in DATA_SUFFIXES:
        raise ManifestError(
            f"data.paths: must be empty for {source!r}; set data.source to text, jsonl, parquet or"
            " chat"
        )
    found = data_files([folder / path for path in paths], str(source))
    total = sum(file.stat().st_size for file in found)
    if found and total <= DATA_ASSET_BYTES_MAX and len(found) <= limits.ASSETS_MAX // 2:
        # Numbered, so that the order is kept and two files of one name don't collide.
        named = {f"data/{i:03d}": file for i, file in enumerate(found)}
        files.update(named)
        data["paths"] = list(named)
    return found


def _take_questions(evaluation: dict[str, Any], folder: Path, files: dict[str, Content]) -> None:
    """Replace `evaluation.paths` by assets: everybody must have the same questions."""
    if "paths" not in evaluation:
        return
    paths = evaluation["paths"]
    if not isinstance(paths, list) or not all(isinstance(p, str) and p for p in paths):
        raise ManifestError(
            f"evaluation.paths: must be a list of paths (got {paths!r}); correct it"
        )
    found = data_files([folder / path for path in paths], "chat")
    total = sum(file.stat().st_size for file in found)
    if total > DATA_ASSET_BYTES_MAX or len(found) > limits.ASSETS_MAX // 4:
        raise DataError(
            f"evaluation.paths: {len(found)} files of {total:,} bytes; at most"
            f" {limits.ASSETS_MAX // 4} of {DATA_ASSET_BYTES_MAX:,} together travel to joiners:"
            " take some rows"
        )
    named = {f"data/questions-{i:03d}": file for i, file in enumerate(found)}
    files.update(named)
    evaluation["paths"] = list(named)


def _asset(name: str, content: Content) -> dict[str, Any]:
    if isinstance(content, bytes):
        return {"name": name, "sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    size = content.stat().st_size
    if size == 0:
        raise DataError(f"{content}: the file is empty; name one with content")
    with content.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    Asset(name=name, sha256=digest, bytes=size)  # a bad name is said with the file at hand
    return {"name": name, "sha256": digest, "bytes": size}

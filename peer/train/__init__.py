"""Training: methods, models, data, and the thread that runs them.

    tokenizer = build_tokenizer(manifest, assets)
    data = build_data(manifest, assets, tokenizer)
    method = build_method(manifest, assets)

`assets` is the folder that holds the run's files under their asset names. All three take seconds
where a model or large files are involved: call them in the training thread (`Trainer`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from peer.errors import DataError

if TYPE_CHECKING:
    from peer.manifest import Manifest
    from peer.train.data import Blocks
    from peer.train.flat import FlatMethod
    from peer.train.tokens import Tokenizer

__all__ = ["build_data", "build_method", "build_tokenizer"]


def build_method(
    manifest: Manifest,
    assets: Path | None = None,
    device: str | None = None,
    threads: int | None = None,
) -> FlatMethod:
    """The manifest's method with its model on `device` (by default CUDA if there is any).

    Raises:
        ManifestError: it makes no working model, one too large for this machine, or one too small
            for so many fragments.
        StorageError: an asset is missing.
    """
    import numpy as np
    import torch

    from peer.manifest import ADAPTIVE
    from peer.train.flat import Streaming
    from peer.train.inner import Inner
    from peer.train.lora import LoraMethod
    from peer.train.models import build_model
    from peer.train.pretrain import MEAN_CODEC, PretrainMethod
    from tensorcodecs import get_codec

    if threads is not None:
        torch.set_num_threads(threads)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = build_model(manifest, assets)
    streaming = Streaming(
        fragments=manifest.schedule.fragments, tau=manifest.outer.tau, alpha=manifest.outer.alpha
    )
    if manifest.method.kind == "lora":
        return LoraMethod(
            model,
            manifest.method,
            manifest.inner,
            where,
            manifest.model.seed,
            staleness=manifest.outer.staleness,
            streaming=streaming,
        )
    adaptive = manifest.codec.name == ADAPTIVE
    codec = get_codec(MEAN_CODEC if adaptive else manifest.codec.name)
    for used in (codec, get_codec(MEAN_CODEC)):
        used.encode(np.zeros(1, np.float32))  # compiles or loads its loops before the first round
    inner = Inner(model, manifest.inner, where)
    mixing = manifest.schedule.gossip_every > 0
    return PretrainMethod(
        inner, manifest.outer, codec, adaptive=adaptive, mixing=mixing, streaming=streaming
    )


def build_tokenizer(manifest: Manifest, assets: Path | None = None) -> Tokenizer:
    """The manifest's tokenizer.

    Raises:
        ManifestError: it can't be read, or knows more ids than the model.
        StorageError: its file is missing.
    """
    from peer.errors import ManifestError
    from peer.train.models import require_asset
    from peer.train.tokens import ByteTokenizer, FileTokenizer

    if manifest.model.tokenizer == "bytes":
        return ByteTokenizer()
    tokenizer = FileTokenizer(require_asset(assets, "tokenizer/tokenizer.json"))
    vocabulary = int(manifest.model.config["vocab_size"])
    if tokenizer.size > vocabulary:
        raise ManifestError(
            f"model.tokenizer: has {tokenizer.size} ids and the model only {vocabulary}; raise "
            "model.config.vocab_size or choose the model's own tokenizer"
        )
    return tokenizer


def build_data(
    manifest: Manifest,
    assets: Path | None,
    tokenizer: Tokenizer,
    paths: Sequence[Path] = (),
) -> Blocks:
    """The manifest's data, or this peer's own files of the same kind where `paths` are given.

    Raises:
        DataError: missing, empty, not text, or too little; or the run leaves the data to each
            peer and there are no `paths`.
        StorageError: a data asset is missing.
    """
    from peer.manifest_toml import data_files
    from peer.train import data
    from peer.train.models import require_asset

    spec = manifest.data
    held_out: data.Corpus | None = None
    corpus: data.Corpus
    source = spec.source if not (paths and spec.source in ("stdlib", "hf")) else "text"
    files: Sequence[Path] = data_files(paths, source)
    if not files:
        files = [require_asset(assets, name) for name in spec.paths]
    if source in ("text", "jsonl", "parquet") and not files:
        raise DataError(
            f"this run leaves its data ({source}) to each peer; name your files with --data PATH"
        )
    match source:
        case "stdlib":
            train, other = data.stdlib_files()
            corpus = data.TextFiles(train, check=False)
            held_out = data.TextFiles(other, check=False)
        case "text":
            corpus = data.TextFiles(files)
        case "jsonl":
            corpus = data.JsonLines(files, spec.fields)
        case "parquet":
            corpus = data.parquet_rows(files, spec.fields)
        case "hf":
            corpus = data.hub_rows(spec.dataset, spec.subset, spec.split, spec.fields)
    return data.Blocks(
        corpus,
        tokenizer,
        sequence_length=spec.sequence_length,
        block_samples=spec.block_samples,
        validation_share=spec.validation_share,
        validation_samples=spec.validation_samples,
        held_out=held_out,
        where=str(files[0]) if files else source,
    )

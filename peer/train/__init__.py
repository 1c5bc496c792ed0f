"""Training: methods, models, data, and the thread that runs them.

    tokenizer = build_tokenizer(manifest, assets)
    data = build_data(manifest, assets, tokenizer)
    method = build_method(manifest, assets)

`assets` is the folder that holds the run's files under their asset names. All three take seconds
where a model or large files are involved: call them in the training thread (`Trainer`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from peer.errors import DataError

if TYPE_CHECKING:
    from torch.nn import Module

    from peer.manifest import Manifest
    from peer.train.local import LocalValues
    from peer.train.means import Wish
    from peer.train.method import DataSource, ModelMethod
    from peer.train.tokens import Tokenizer
    from protocols.identity import Signer

__all__ = ["build_data", "build_method", "build_tokenizer"]


def build_method(
    manifest: Manifest,
    assets: Path | None = None,
    device: str | None = None,
    threads: int | None = None,
    *,
    wish: Wish | None = None,
    upload_bps: float | None = None,
    signer: Signer | None = None,
    say: Callable[[str], None] = lambda _: None,
    local: Callable[[Module], LocalValues] | None = None,
) -> ModelMethod:
    """The manifest's method with its model on `device` (by default CUDA if there is any).

    `wish`: what this peer trains in a hybrid run, decided with a look at the machine and its
    `upload_bps`; None: the run's rank, whatever that takes. `signer`: who signs what is sent, where
    a method asks for that; None: nobody, and then nothing is sent. `say`: told what takes long, in
    this thread and in those that the method is used in. `local`: makes the local values of a
    `pretrain` or `lora` run out of its model (with adapters), which they are to begin with; None:
    `Inner`, which trains them.

    Raises:
        UsageError: a wish for what the run does not have.
        ManifestError: it makes no working model, one too large for this machine, or one too small
            for so many fragments.
        StorageError: an asset is missing.
    """
    import numpy as np
    import torch

    from peer.manifest import ADAPTIVE
    from peer.train.flat import Streaming
    from peer.train.inner import Inner
    from peer.train.lora import LoraMethod, with_adapters
    from peer.train.models import build_model
    from peer.train.pretrain import MEAN_CODEC, PretrainMethod
    from tensorcodecs import get_codec

    if threads is not None:
        torch.set_num_threads(threads)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = build_model(manifest, assets)
    if manifest.method.kind == "zo":
        from peer.train.zeroth import ZerothMethod
        from peer.train.zeroth_rules import rules_of

        if manifest.zeroth.adapters:
            model = with_adapters(model, manifest.method, manifest.model.seed)
        return ZerothMethod(
            model, partial(rules_of, manifest), where, signer, folder=assets, say=say
        )
    values = local or (lambda model: Inner(model, manifest.inner, where))
    streaming = Streaming(
        fragments=manifest.schedule.fragments, tau=manifest.outer.tau, alpha=manifest.outer.alpha
    )
    if manifest.method.kind == "hybrid":
        from peer.train.adapted import layers_of
        from peer.train.hybrid import HybridMethod, codec_for
        from peer.train.means import Machine, Wish, decide, job_of, look_around
        from peer.train.own_change import bits_of

        shapes = [layer.shape for layer in layers_of(model, manifest.method.targets).values()]
        job = job_of(manifest, model, shapes, bits_of(codec_for(manifest)))
        seen = Machine(free_bytes=0, flops=1.0) if wish is None else look_around(where, upload_bps)
        means = decide(wish or Wish("lora"), job, seen, manifest.method.admit)
        return HybridMethod(model, manifest, where, means, say=say)
    if manifest.method.kind == "lora":
        return LoraMethod(
            values(with_adapters(model, manifest.method, manifest.model.seed)),
            manifest.method,
            staleness=manifest.outer.staleness,
            streaming=streaming,
        )
    adaptive = manifest.codec.name == ADAPTIVE
    codec = get_codec(MEAN_CODEC if adaptive else manifest.codec.name)
    for used in (codec, get_codec(MEAN_CODEC)):
        used.encode(np.zeros(1, np.float32))  # compiles or loads its loops before the first round
    mixing = manifest.schedule.gossip_every > 0
    return PretrainMethod(
        values(model), manifest.outer, codec, adaptive=adaptive, mixing=mixing, streaming=streaming
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
) -> DataSource:
    """The manifest's data, or this peer's own files of the same kind where `paths` are given.

    Raises:
        DataError: missing, empty, not text, or too little; or the run leaves the data to each
            peer and there are no `paths`.
        ManifestError: the run's chat format is damaged.
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
    if source in ("text", "jsonl", "parquet", "chat") and not files:
        raise DataError(
            f"this run leaves its data ({source}) to each peer; name your files with --data PATH"
        )
    if source == "chat":
        from peer.train.chat import ChatBlocks
        from peer.train.chat_format import format_beside, plain

        form = None if assets is None else format_beside(assets / "tokenizer" / "tokenizer.json")
        return ChatBlocks(
            files,
            tokenizer,
            form or plain(tokenizer),
            sequence_length=spec.sequence_length,
            block_samples=spec.block_samples,
            validation_share=spec.validation_share,
            validation_samples=spec.validation_samples,
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

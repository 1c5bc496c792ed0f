"""A run's manifest: everything peers must agree on, as canonical bytes whose hash is the run's id.

It is data. It holds no code and no path on anybody's machine: files that a run needs (weights, a
tokenizer, small data) are *assets*, named and hashed here and fetched from peers. The owner of a
run writes TOML (`read_toml`); everybody else reads canonical JSON from strangers
(`Manifest.from_canonical`). Both pass the same checks, and every error names the field.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, Self

from peer.errors import ManifestError, VersionError
from peer.manifest_checks import above_zero as _above_zero
from peer.manifest_checks import between as _between
from peer.manifest_checks import need as _need
from peer.manifest_checks import short as _short
from peer.manifest_evaluation import EvaluationSpec
from peer.manifest_zeroth import ZerothSpec
from protocols import limits
from protocols.types import RunId
from tensorcodecs import CODEC_NAMES, get_codec

CONFIG_DEPTH_MAX: Final = 4  # rope_parameters of layer types is the deepest that real configs go
CONFIG_ITEMS_MAX: Final = 1024  # layer_types of a deep model has a few hundred
VOCABULARY_MAX: Final = 2**21  # the largest real one is about 2**18
SEQUENCE_MAX: Final = 2**20

MODEL_TYPES: Final = (
    "llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gpt2", "gpt_neox", "phi", "phi3",
    "olmo2",
)  # fmt: skip
"""Architectures that a manifest may name: all in transformers itself, none runs remote code."""

CONFIG_INTS: Final[Mapping[str, int]] = {
    "vocab_size": VOCABULARY_MAX,
    "hidden_size": 2**16, "n_embd": 2**16,
    "intermediate_size": 2**18, "n_inner": 2**18,
    "num_hidden_layers": 512, "n_layer": 512,
    "num_attention_heads": 1024, "n_head": 1024, "num_key_value_heads": 1024, "head_dim": 4096,
    "max_position_embeddings": SEQUENCE_MAX, "original_max_position_embeddings": SEQUENCE_MAX,
    "n_positions": 2**14,  # gpt2 allocates a square mask of this side
    "sliding_window": SEQUENCE_MAX, "max_window_layers": 512, "query_pre_attn_scalar": 2**16,
    "bos_token_id": VOCABULARY_MAX, "eos_token_id": VOCABULARY_MAX, "pad_token_id": VOCABULARY_MAX,
    "pretraining_tp": 1,
}  # fmt: skip
"""Whole numbers of a model config, each with the most it may be."""

CONFIG_OTHERS: Final = frozenset({
    "activation_function", "attention_bias", "attention_dropout", "attn_logit_softcapping",
    "attn_pdrop", "embd_pdrop", "embedding_dropout", "final_logit_softcapping", "hidden_act",
    "hidden_activation", "hidden_dropout", "initializer_range", "layer_norm_eps",
    "layer_norm_epsilon", "layer_types", "mlp_bias", "model_type", "partial_rotary_factor",
    "qk_layernorm", "reorder_and_upcast_attn", "resid_pdrop", "rms_norm_eps", "rope_parameters",
    "rope_scaling", "rope_theta", "rotary_emb_base", "rotary_pct",
    "scale_attn_by_inverse_layer_idx", "scale_attn_weights", "tie_word_embeddings",
    "use_bidirectional_attention", "use_parallel_residual", "use_sliding_window",
})  # fmt: skip
"""The other keys that a model config may have. Left out on purpose: whatever names code, kernels
or places (`auto_map`, `attn_implementation`, `quantization_config`, `_name_or_path`)."""

KINDS: Final = ("dense", "lowrank", "seeds", "sparse")
"""Of contributions to a hybrid run."""

_ASSET_NAME: Final = re.compile(r"(model|tokenizer|data)/[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_DATASET_NAME: Final = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_LABEL: Final = re.compile(r"[\w .:+-]{1,64}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Asset:
    """A file that every peer of the run needs, known by its hash and fetched from peers."""

    name: str
    """`model/...`, `tokenizer/...` or `data/...`: one folder, one plain file name."""
    sha256: str
    """64 hex characters."""
    bytes: int
    """Its exact size."""

    def __post_init__(self) -> None:
        _need(
            _ASSET_NAME.fullmatch(self.name) is not None,
            "assets.name", "must be model/, tokenizer/ or data/ and a plain file name", self.name,
        )  # fmt: skip
        good = re.fullmatch(r"[0-9a-f]{64}", self.sha256) is not None
        _need(good, f"assets.{self.name}.sha256", "must be 64 hex digits", self.sha256)
        _between(f"assets.{self.name}.bytes", self.bytes, 1, limits.ASSET_BYTES_MAX)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """What is trained: a transformers causal language model."""

    config: dict[str, Any]
    """The model's transformers config with its `model_type`. Never changed after construction."""
    tokenizer: str = "bytes"
    """`bytes` (ids 0..255, 256 ends a document), or `file`: the asset tokenizer/tokenizer.json."""
    seed: int = 0
    """Of the first weights, where none are given as assets."""

    def __post_init__(self) -> None:
        _check_config(self.config)
        _need(self.tokenizer in ("bytes", "file"), "model.tokenizer", "must be bytes or a file",
              self.tokenizer)  # fmt: skip
        _between("model.seed", self.seed, 0, 2**63 - 1)
        if self.tokenizer == "bytes":
            vocabulary = self.config["vocab_size"]
            _need(vocabulary >= 257, "model.config.vocab_size",
                  "must be at least 257 for the bytes tokenizer", vocabulary)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSpec:
    """What it is trained on, and how that is cut into blocks that peers share out."""

    source: Literal["stdlib", "text", "jsonl", "parquet", "hf", "chat"] = "stdlib"
    """`stdlib` is the text of this Python's own modules: it differs a little between Python
    versions, which is fine, because blocks are shared out by number. `chat`: questions and answers,
    of which the answers are learned (`peer.train.chat`)."""
    paths: tuple[str, ...] = ()
    """Names of data assets. Empty: each peer brings its own files (`--data`)."""
    fields: tuple[str, ...] = ("text",)
    """jsonl, parquet, hf: the fields or columns to read, joined by a line feed. chat knows its
    own."""
    dataset: str = ""
    """hf: OWNER/NAME of a dataset on the Hugging Face hub."""
    subset: str = ""
    """hf: the dataset's configuration, if it has several."""
    split: str = "train"
    """hf: the split to train on."""
    sequence_length: int = 128
    """Tokens in a sample."""
    block_samples: int = 32
    """Samples in a block, roughly: a block is a range of text about that long."""
    validation_share: float = 0.02
    """Share of the blocks (for stdlib: of the files, for chat: of the rows) that is held out, never
    trained on."""
    validation_samples: int = 64
    """At most this many held-out samples are evaluated."""

    def __post_init__(self) -> None:
        for path in self.paths:
            good = path.startswith("data/") and _ASSET_NAME.fullmatch(path) is not None
            _need(good, "data.paths", "must name data assets", path)
        _need(len(self.paths) <= limits.ASSETS_MAX, "data.paths", "too many", len(self.paths))
        _need(self.source != "chat" or self.fields == ("text",), "data.fields",
              "must be left out for chat, whose rows say by their keys what they are",
              self.fields)  # fmt: skip
        _need(1 <= len(self.fields) <= 8, "data.fields", "must be 1 to 8 names", self.fields)
        for name in self.fields:
            _need(0 < len(name) <= 128, "data.fields", "must be names of 1 to 128 characters", name)
        if self.source == "hf":
            good = _DATASET_NAME.fullmatch(self.dataset) is not None
            _need(good, "data.dataset", "must be OWNER/NAME of a dataset on the hub", self.dataset)
        for where, text in (("data.subset", self.subset), ("data.split", self.split)):
            _need(not text or _LABEL.fullmatch(text) is not None, where, "must be a name", text)
        _between("data.sequence_length", self.sequence_length, 8, SEQUENCE_MAX)
        _between("data.block_samples", self.block_samples, 1, 65536)
        _between("data.validation_share", self.validation_share, 0.0001, 0.5)
        _between("data.validation_samples", self.validation_samples, 1, 65536)


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodSpec:
    """How local work becomes a contribution."""

    kind: Literal["pretrain", "lora", "hybrid", "zo"] = "pretrain"
    """`pretrain`: all weights, by pseudo-gradients. `lora`: low-rank adapters on frozen weights.
    `hybrid`: the same, but each peer trains by its own means (`peer.train.hybrid`). `zo`: zeroth
    order, adapters or all weights, by forward passes alone (section `zeroth`)."""
    rank: int = 8
    """lora, zo: the rank of every adapter. hybrid: of the common state, and the most that a peer
    may send."""
    alpha: float = 16.0
    """lora, hybrid, zo: adapters are scaled by alpha / rank, a hybrid peer's by its own rank."""
    targets: tuple[str, ...] = ()
    """lora, hybrid, zo: names of layers that get an adapter (ends of module names); empty: all
    linear."""
    dropout: float = 0.0
    """lora, hybrid: dropout on the adapters' input."""
    aggregate: Literal["exact", "fedit"] = "exact"
    """lora: `exact`: products are averaged. `fedit`: A and B, each by itself, as a baseline."""
    admit: tuple[str, ...] = ("dense", "lowrank", "seeds", "sparse")
    """hybrid: kinds of contributions that count (`peer.finetune.coded`)."""
    effective_dim: float = 100.0
    """hybrid: d, in which a zeroth-order peer of P directions counts P / (d + P) of its tokens."""
    seeds_lr: float = 0.01
    """hybrid: how far a zeroth-order peer goes in a step, in each value of B, at warm-up's end."""
    spectrum: float = 1.0
    """hybrid: the singular values of a round's mean change are raised to this power, their norm
    kept. Below 1 what few peers have learned counts more, against what all have (drift)."""
    step: float = 1.0
    """hybrid: the mean change is multiplied by this before the state takes it."""

    def __post_init__(self) -> None:
        _between("method.rank", self.rank, 1, 1024)
        _above_zero("method.alpha", self.alpha, 65536)
        _need(len(self.targets) <= 64, "method.targets", "must be at most 64 names",
              len(self.targets))  # fmt: skip
        for name in self.targets:
            good = re.fullmatch(r"\w[\w.]{0,127}", name, re.ASCII) is not None
            _need(good, "method.targets", "must be names of modules", name)
        _between("method.dropout", self.dropout, 0, 0.9)
        some = bool(self.admit) and list(self.admit) == sorted(set(self.admit) & set(KINDS))
        _need(some, "method.admit", f"must be some of {_list(KINDS)}, in this order", self.admit)
        _need(self.aggregate == "exact" or self.kind == "lora", "method.aggregate",
              f"must be exact for {self.kind}", self.aggregate)  # fmt: skip
        _between("method.effective_dim", self.effective_dim, 0, 1e12)
        _above_zero("method.seeds_lr", self.seeds_lr, 1)
        _between("method.spectrum", self.spectrum, 0, 1)
        _above_zero("method.step", self.step, 10)
        for name, value in (("spectrum", self.spectrum), ("step", self.step)):
            good = value == 1 or self.kind == "hybrid"
            _need(good, f"method.{name}", f"must be 1 for {self.kind}", value)


@dataclass(frozen=True, kw_only=True, slots=True)
class InnerSpec:
    """AdamW, each peer on its own between rounds. zo takes `lr` and `batch_size` of it alone."""

    lr: float = 1e-3
    """Learning rate after the warm-up; zo: of every step."""
    betas: tuple[float, ...] = (0.9, 0.95)
    """Decay of the first and second moment."""
    weight_decay: float = 0.1
    """On matrices; never on norms and biases."""
    grad_clip: float = 1.0
    """Largest norm of a gradient; larger ones are scaled down to it."""
    warmup_steps: int = 50
    """Inner steps over which a peer's learning rate rises from zero."""
    batch_size: int = 8
    """Samples in an inner step."""
    ends: str = ""
    """When learning ends, as ISO 8601 with a time zone ("2027-01-31T00:00:00Z"): by then every
    peer's learning rate is zero, and what keeps the groups apart goes away. "": never."""
    cooldown_s: float = 0.0
    """Seconds before `ends` over which the learning rate falls, in a straight line."""

    def rate_at(self, unix_s: float) -> float:
        """Share of `lr` that counts at a calendar time, beside the warm-up: 1, and 0 at the end.

        By the calendar, as groups number their rounds each for itself, and peers come and go.
        """
        if not self.ends:
            return 1.0
        left_s = datetime.fromisoformat(self.ends).timestamp() - unix_s
        if left_s <= 0 or self.cooldown_s == 0:
            return float(left_s > 0)
        return min(1.0, left_s / self.cooldown_s)

    def __post_init__(self) -> None:
        _above_zero("inner.lr", self.lr, 1)
        _need(len(self.betas) == 2, "inner.betas", "must be two numbers", self.betas)
        for beta in self.betas:
            _need(0 <= beta < 1, "inner.betas", "must be from 0 to less than 1", beta)
        _between("inner.weight_decay", self.weight_decay, 0, 10)
        _above_zero("inner.grad_clip", self.grad_clip, 1e6)
        _between("inner.warmup_steps", self.warmup_steps, 0, 10**7)
        _between("inner.batch_size", self.batch_size, 1, 65536)
        _need(_is_moment(self.ends), "inner.ends",
              "must be empty, or a date and time with its zone such as 2027-01-31T00:00:00Z",
              self.ends)  # fmt: skip
        _between("inner.cooldown_s", self.cooldown_s, 0, 10 * 365 * 86400)
        _need(self.cooldown_s == 0 or bool(self.ends), "inner.cooldown_s",
              "needs `ends`: a learning rate that falls must know until when",
              self.cooldown_s)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class OuterSpec:
    """pretrain: Nesterov momentum on the averaged update. lora takes the average as it is."""

    lr: float = 0.7
    """Share of the averaged update that is applied."""
    momentum: float = 0.9
    """How much of the past updates rides along."""
    staleness: float = 0.5
    """lambda: work that missed s exchanges counts 1 / (1 + lambda s) of its tokens. lora too."""
    asynchronous: bool = False
    """pretrain: a round takes in whoever has done its local steps; delayed Nesterov."""
    delay: int = 4
    """asynchronous: outcomes from one change of the momentum to the next."""
    local_steps: int = 20
    """asynchronous: inner steps of the fastest peer between its contributions."""
    tau: int = 0
    """Inner steps from the moment a contribution is frozen after which its outcome is merged into
    the local values at the earliest; 0: when it arrives. lora too."""
    alpha: float = 0.0
    """Share of the local values that stays when an outcome is merged into them. lora too."""

    def __post_init__(self) -> None:
        _above_zero("outer.lr", self.lr, 10)
        _need(0 <= self.momentum < 1, "outer.momentum", "must be from 0 to less than 1",
              self.momentum)  # fmt: skip
        _between("outer.staleness", self.staleness, 0, 100)
        _between("outer.delay", self.delay, 1, 1024)
        _between("outer.local_steps", self.local_steps, 1, 10**6)
        _between("outer.tau", self.tau, 0, 10**6)
        _need(0 <= self.alpha < 1, "outer.alpha", "must be from 0 to less than 1", self.alpha)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleSpec:
    """When things happen. Rounds are paced in time, so that nobody waits for the slowest."""

    round_s: float = 5.0
    """Seconds of training between two averages of the same values."""
    round_s_max: float = 0.0
    """Slow exchanges lengthen rounds up to this; 0: eight times `round_s`."""
    exchange_share: float = 0.5
    """Of a round's time that its exchange may take before rounds get longer."""
    exchange_s: float = 20.0
    """Deadline of one exchange, in seconds: then it closes with whoever is in."""
    evaluate_every: int = 10
    """Rounds between two looks at the held-out text; 0: never."""
    checkpoint_every: int = 10
    """Rounds between two full checkpoints."""
    gossip_every: int = 10
    """pretrain: rounds between two mixes of a group's state with another group's; 0: never, and so
    it must be for lora, whose factors can't be averaged one by one. A mix takes some three rounds
    to be in both states: much more often, and a group's mixes get into each other's way."""
    fragments: int = 1
    """Parts of the state that take turns: each round exchanges one of them, and rounds come so many
    times as often. What counts rounds here counts a turn of all of them as one."""
    gossip_slots: int = 0
    """Parts of the state that are mixed with different groups, by different members; 0: as many as
    aggregators_max."""

    def __post_init__(self) -> None:
        _between("schedule.round_s", self.round_s, 0.1, 86400)
        _need(self.round_s_max == 0 or self.round_s <= self.round_s_max <= 86400,
              "schedule.round_s_max", "must be 0, or from round_s to 86400",
              self.round_s_max)  # fmt: skip
        _above_zero("schedule.exchange_share", self.exchange_share, 1)
        _between("schedule.exchange_s", self.exchange_s, 0.5, 86400)
        _between("schedule.evaluate_every", self.evaluate_every, 0, 10**6)
        _between("schedule.checkpoint_every", self.checkpoint_every, 1, 10**6)
        _between("schedule.gossip_every", self.gossip_every, 0, 10**6)
        _between("schedule.gossip_slots", self.gossip_slots, 0, limits.GOSSIP_SLOTS_MAX)
        _between("schedule.fragments", self.fragments, 1, limits.FRAGMENTS_MAX)
        _need(self.round_s / self.fragments >= 0.1, "schedule.round_s",
              f"must be at least 0.1 for each of the {self.fragments} fragments",
              self.round_s)  # fmt: skip

    @property
    def longest_round_s(self) -> float:
        """`round_s_max`, or what it is by default."""
        return self.round_s_max or min(8 * self.round_s, 86400.0)


ADAPTIVE: Final = "auto"
"""A codec's name in a manifest: each link chooses by its bandwidth."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CodecSpec:
    """How contributions are coded on the wire."""

    name: str = "q4"
    """One of tensorcodecs' codecs. lora sends its small factors exactly, whatever this says."""

    def __post_init__(self) -> None:
        if self.name == ADAPTIVE:
            return
        try:
            get_codec(self.name)
        except ValueError:
            names = ", ".join(CODEC_NAMES)
            steps = "sparse:K (K to 1024), or ecsq:A (A from 0.45 to 4)"
            expected = f"must be one of {names}, {ADAPTIVE}, {steps}"
            _need(False, "codec.name", expected, self.name)


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupSpec:
    """How many peers average together, and how."""

    members_max: int = 8
    """A group that outgrows this splits."""
    aggregators_max: int = 8
    """At most this many members share the work of averaging."""
    quorum: float = 0.5
    """Share of the roster that must be in for an average to count."""

    def __post_init__(self) -> None:
        _between("group.members_max", self.members_max, 2, limits.GROUP_MEMBERS_MAX)
        _between("group.aggregators_max", self.aggregators_max, 1, limits.AGGREGATORS_MAX)
        _above_zero("group.quorum", self.quorum, 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """A run. Equal manifests have equal bytes and equal ids on every machine."""

    name: str
    """What people call the run."""
    min_version: int = limits.PROTOCOL_VERSION
    """The oldest protocol version that can take part."""
    model: ModelSpec
    data: DataSpec = field(default_factory=DataSpec)
    method: MethodSpec = field(default_factory=MethodSpec)
    zeroth: ZerothSpec = field(default_factory=ZerothSpec)
    inner: InnerSpec = field(default_factory=InnerSpec)
    outer: OuterSpec = field(default_factory=OuterSpec)
    schedule: ScheduleSpec = field(default_factory=ScheduleSpec)
    evaluation: EvaluationSpec = field(default_factory=EvaluationSpec)
    codec: CodecSpec = field(default_factory=CodecSpec)
    group: GroupSpec = field(default_factory=GroupSpec)
    assets: tuple[Asset, ...] = ()
    """In order of their names, each name once."""

    BYTES_MAX: ClassVar[int] = limits.MANIFEST_BYTES_MAX

    def __post_init__(self) -> None:
        good = _LABEL.fullmatch(self.name) is not None and self.name == self.name.strip()
        _need(good, "name", "must be 1 to 64 letters, digits, spaces or . : + - _", self.name)
        _need(self.min_version >= 1, "min_version", "must be at least 1", self.min_version)
        _need(self.method.kind == "pretrain" or not self.schedule.gossip_every,
              "schedule.gossip_every",
              f"must be 0 for {self.method.kind}: groups of it can't be mixed yet",
              self.schedule.gossip_every)  # fmt: skip
        if self.method.kind == "hybrid":
            for where, value, only in (
                ("schedule.fragments", self.schedule.fragments, 1),
                ("outer.tau", self.outer.tau, 0),
                ("outer.alpha", self.outer.alpha, 0.0),
            ):
                _need(value == only, where, f"must be {only:g} for hybrid", value)
        if self.method.kind == "zo":
            _need(self.schedule.fragments == 1, "schedule.fragments",
                  "must be 1 for zo, whose contribution is one piece",
                  self.schedule.fragments)  # fmt: skip
            _need(not self.outer.asynchronous, "outer.asynchronous",
                  "must be false for zo: what a peer measures holds for one round",
                  self.outer.asynchronous)  # fmt: skip
            _need(not self.inner.ends, "inner.ends",
                  "must be empty for zo, whose learning rate is the same in every round",
                  self.inner.ends)  # fmt: skip
        _need(not self.outer.asynchronous or self.schedule.fragments == 1,
              "schedule.fragments", "must be 1 where outer.asynchronous is true: who contributes to"
              " every second round would always meet the same fragment",
              self.schedule.fragments)  # fmt: skip
        names = [asset.name for asset in self.assets]
        _need(len(names) <= limits.ASSETS_MAX, "assets", f"at most {limits.ASSETS_MAX} files",
              len(names))  # fmt: skip
        _need(names == sorted(set(names)), "assets", "must be in order, each name once", names)
        for path in self.data.paths:
            _need(path in names, "data.paths", "must name assets of this run", path)
        for path in self.evaluation.paths:
            _need(path in names and path not in self.data.paths, "evaluation.paths",
                  "must name assets of this run that nobody trains on", path)  # fmt: skip
        if self.evaluation.rows:
            _need(self.schedule.evaluate_every > 0, "schedule.evaluate_every",
                  "must be at least 1 where evaluation.rows is",
                  self.schedule.evaluate_every)  # fmt: skip
            _need(bool(self.evaluation.paths) or self.data.source == "chat", "evaluation.paths",
                  "must name files of questions: only chat data holds some out",
                  self.evaluation.paths)  # fmt: skip
        if self.model.tokenizer == "file":
            _need("tokenizer/tokenizer.json" in names, "model.tokenizer",
                  "needs the asset tokenizer/tokenizer.json", names)  # fmt: skip
        if self.data.source in ("stdlib", "hf"):
            _need(not self.data.paths, "data.paths", f"must be empty for {self.data.source}",
                  self.data.paths)  # fmt: skip
        config = self.model.config
        room = config.get("n_positions", config.get("max_position_embeddings"))
        if room is not None:
            _need(self.data.sequence_length <= room, "data.sequence_length",
                  f"must be at most the model's {room} positions",
                  self.data.sequence_length)  # fmt: skip

    @classmethod
    def from_toml(cls, text: str, folder: Path) -> Self:
        """The manifest that `text` describes; relative paths in it start at `folder`.

        Raises:
            ManifestError: names the field and says what it must be.
            DataError: a data file is missing.
        """
        from peer.manifest_toml import read_toml

        return typing.cast("Self", read_toml(text, folder).manifest)

    @classmethod
    def from_canonical(cls, data: bytes) -> Self:
        """Read canonical bytes, perhaps from a stranger.

        Raises:
            ManifestError: too large, malformed, or not what `to_canonical` would write.
            VersionError: the run needs a newer program.
        """
        if len(data) > limits.MANIFEST_BYTES_MAX:
            raise ManifestError(
                f"the manifest has {len(data)} bytes, at most {limits.MANIFEST_BYTES_MAX} are "
                "allowed; ask the run's owner for a smaller one"
            )
        try:
            raw = json.loads(data.decode("utf-8"), parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise ManifestError(
                f"the manifest is not JSON ({_short(str(error))}); ask another peer for it"
            ) from None
        manifest = typing.cast("Self", load(raw))
        try:
            same = manifest.to_canonical() == data
        except UnicodeEncodeError:
            same = False
        if not same:
            raise ManifestError("the manifest is not in canonical form; ask another peer for it")
        return manifest

    def to_canonical(self) -> bytes:
        """JSON in UTF-8 with sorted keys and no spaces; equal manifests give equal bytes."""
        return json.dumps(
            dataclasses.asdict(self),
            sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False,
        ).encode("utf-8")  # fmt: skip

    def run_id(self) -> RunId:
        """SHA-256 of the canonical bytes, in hex."""
        return RunId(hashlib.sha256(self.to_canonical()).hexdigest())

    def asset_names(self, kind: str) -> list[str]:
        """Names of the assets in one folder: `model`, `tokenizer` or `data`."""
        return [asset.name for asset in self.assets if asset.name.startswith(kind + "/")]


def default_manifest() -> Manifest:
    """The run that a peer starts when it is told nothing: bytes, about 3.2 M parameters."""
    return Manifest(
        name="first light",
        model=ModelSpec(
            config={
                "model_type": "llama",
                "vocab_size": 320,  # 256 bytes and an end mark, rounded up to whole tiles
                "hidden_size": 256,
                "intermediate_size": 688,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "max_position_embeddings": 1024,
                "tie_word_embeddings": True,
                "bos_token_id": 256,
                "eos_token_id": 256,
            }
        ),
        inner=InnerSpec(lr=2e-3, warmup_steps=20),
        # A CPU makes about a dozen steps in a round. With so few, momentum 0.9 (which is meant for
        # hundreds) overshoots: the loss of the first minutes was higher with 1, 2, 4 and 8 peers.
        outer=OuterSpec(lr=0.7, momentum=0.5),
    )


def _is_moment(text: str) -> bool:
    """Whether a moment is meant, by everybody the same; or none at all."""
    if not text:
        return True
    try:
        return len(text) <= 40 and datetime.fromisoformat(text).tzinfo is not None
    except ValueError:
        return False


def load(raw: object, *, lenient_numbers: bool = False) -> Manifest:
    """A manifest from a tree of plain values. `lenient_numbers`: 1 will do for 1.0 (TOML).

    Raises:
        ManifestError, VersionError: as for `Manifest.from_canonical`.
    """
    if isinstance(raw, dict):
        wanted = raw.get("min_version", 1)
        if type(wanted) is int and wanted > limits.PROTOCOL_VERSION:
            raise VersionError(
                f"this run needs version {wanted} of the protocol and this program speaks "
                f"{limits.PROTOCOL_VERSION}; update it and try again"
            )
    return typing.cast("Manifest", _read(Manifest, raw, "", lenient_numbers))


def _read(hint: Any, raw: Any, where: str, lenient: bool) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _read_section(hint, raw, where, lenient)
    origin = typing.get_origin(hint)
    if origin is Literal:
        choices = typing.get_args(hint)
        _need(type(raw) is str and raw in choices, where, f"must be {_list(choices)}", raw)
        return raw
    if origin is tuple:
        _need(isinstance(raw, list), where, "must be a list", raw)
        item = typing.get_args(hint)[0]
        return tuple(_read(item, part, where, lenient) for part in raw)
    if origin is dict:
        _need(isinstance(raw, dict), where, "must be a table", raw)
        return raw
    if hint is float and lenient and type(raw) is int:
        raw = float(raw)
    words = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
    _need(type(raw) is hint, where, f"must be {words[hint]}", raw)
    if hint is float:
        _need(math.isfinite(raw), where, "must be finite", raw)
    return raw


def _read_section(kind: type[Any], raw: Any, where: str, lenient: bool) -> Any:
    _need(isinstance(raw, dict), where or "manifest", "must be a table", raw)
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    prefix = f"{where}." if where else ""
    for key in raw:
        refuse_unknown(prefix, key, fields)
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in raw:
            raise ManifestError(f"{prefix}{name}: is missing; add it and try again")
    return kind(**{k: _read(hints[k], v, prefix + k, lenient) for k, v in raw.items()})


def refuse_unknown(prefix: str, key: str, known: typing.Iterable[str]) -> None:
    """Raise ManifestError where `key` is none of `known`, with the nearest of them."""
    known = list(known)
    if key not in known:
        near = difflib.get_close_matches(key[:64], known, n=1)
        some = ", ".join(sorted(known)[:12]) + (" ..." if len(known) > 12 else "")
        hint = f"did you mean {prefix}{near[0]}?" if near else f"take it out; known are {some}"
        raise ManifestError(f"{prefix}{_short(key)[1:-1]}: unknown key; {hint}")


def _list(choices: tuple[Any, ...]) -> str:
    return ", ".join(map(str, choices[:-1])) + f" or {choices[-1]}"


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


# ── model configs ────────────────────────────────────────────────────────────────────────


def _check_config(config: Mapping[str, Any]) -> None:
    kind = config.get("model_type")
    _need(kind in MODEL_TYPES, "model.config.model_type", f"must be {_list(MODEL_TYPES)}", kind)
    if config.get("vocab_size") is None:
        raise ManifestError("model.config.vocab_size: is missing; add it and try again")
    known = [*CONFIG_INTS, *sorted(CONFIG_OTHERS)]
    for key, value in config.items():
        where = f"model.config.{key}"
        refuse_unknown("model.config.", key, known)
        if key in CONFIG_INTS and value is not None:
            _need(type(value) is int, where, "must be a whole number", value)
            low = 0 if key.endswith("_token_id") or key == "max_window_layers" else 1
            _need(low <= value <= CONFIG_INTS[key], where, f"must be {low} to {CONFIG_INTS[key]}",
                  value)  # fmt: skip
        else:
            _check_plain(where, value, CONFIG_DEPTH_MAX)


def _check_plain(where: str, value: Any, depth: int) -> None:
    """Bounded plain values: no wide numbers, long texts, deep nests or large lists."""
    _need(depth > 0, where, f"must not be nested deeper than {CONFIG_DEPTH_MAX}", "more")
    if isinstance(value, dict | list):
        _need(len(value) <= CONFIG_ITEMS_MAX, where, "has too many items", len(value))
        for item in value.values() if isinstance(value, dict) else value:
            _check_plain(where, item, depth - 1)
    elif isinstance(value, str):
        _need(len(value) <= 128, where, "must be at most 128 characters", value)
    elif value is not None:
        good = isinstance(value, bool | int | float) and abs(value) <= 1e9
        _need(good, where, "must be a finite number of ordinary size", value)

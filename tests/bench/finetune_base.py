"""A small language model that has read something, and questions that it has not: made once, kept.

Text and tasks come from a folder of the user's (`--data`); nothing else needs it:

    tinyshakespeare.txt                          read
    gsm8k-train.jsonl                            read
    natural-instructions/client_N.json           a task each: those of `CLIENTS` are finetuned on,
                                                 the others are read
    natural-instructions/eval_N.json             held-out rows of `CLIENTS`

What is read is plain text to the model, questions and answers alike, in the format that peers
finetune with. So the base knows what a question looks like, and none of the tasks.

Shapes: N = tokens of all that is read, B = samples, T = tokens in a sample.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch

from peer.manifest import InnerSpec
from peer.train.chat_format import plain
from peer.train.inner import Inner, mean_loss, save_model
from peer.train.models import seeded_model
from peer.train.rows import ChatRows
from peer.train.tokens import FileTokenizer
from tests.bench.result import BenchError, Progress

CLIENTS: Final = (219, 272, 337, 578, 1273, 1363, 1430, 1514)
"""Eight tasks with some 500 rows each, of which nearly all fit into a sample: questions for
answers, films, numbers in gaps, topics, intents, Spanish, arithmetic on lists, primes."""
WHAT_IS_NEEDED: Final = (
    "name a folder with --data DIR that holds tinyshakespeare.txt, gsm8k-train.jsonl and"
    " natural-instructions/client_N.json and eval_N.json (see tests/bench/finetune_base.py)"
)
_END: Final = "</s>"
_SEED: Final = 1
_HELD_OUT: Final = 64  # samples, at the end of what is read


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseSize:
    """The model, and how long it reads."""

    vocabulary: int = 1024
    hidden: int = 160
    intermediate: int = 416
    layers: int = 2
    tokens: int = 128
    batch: int = 16
    steps: int = 1200
    lr: float = 3e-3
    cooldown: float = 0.5
    """Share of the steps over which the rate falls to zero."""


@dataclass(frozen=True, slots=True)
class Base:
    """A folder with `model`, `tokenizer`, and each client's `client_N.json` and `eval_N.json`."""

    folder: Path
    facts: dict[str, Any]
    """`parameters`, `loss` (nats per token of held-out text), `tokens_read`, `clients`."""


def prepare(
    data: Path | None, kept: Path, size: BaseSize, progress: Progress,
    clients: Sequence[int] = CLIENTS,
) -> Base:  # fmt: skip
    """The base of these data, below `kept`, made if it is not there.

    Raises:
        BenchError: data are missing.
    """
    if data is None:
        raise BenchError(WHAT_IS_NEEDED)
    read, asked = _files(data, clients)
    sha = hashlib.sha256(json.dumps([asdict(size), clients, _SEED]).encode())
    sha.update(Path(__file__).read_bytes())
    for file in (*read, *asked):
        sha.update(hashlib.sha256(file.read_bytes()).digest())
    folder = kept / sha.hexdigest()[:16]
    if not (folder / "facts.json").is_file():
        progress("pretraining a base model ...")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for file in asked:
            shutil.copyfile(file, folder / file.name)
        facts = _pretrain(read, folder, size, progress) | {"clients": list(clients)}
        (folder / "facts.json").write_text(json.dumps(facts), "utf-8")
    return Base(folder, json.loads((folder / "facts.json").read_text("utf-8")))


def _files(data: Path, clients: Sequence[int]) -> tuple[list[Path], list[Path]]:
    """(what is read, what is asked)."""
    tasks = data / "natural-instructions"
    others = sorted(
        set(tasks.glob("client_*.json")) - {tasks / f"client_{n}.json" for n in clients}
    )
    read = [data / "tinyshakespeare.txt", data / "gsm8k-train.jsonl", *others]
    asked = [tasks / f"{kind}_{n}.json" for n in clients for kind in ("client", "eval")]
    for file in (*read, *asked):
        if not file.is_file():
            raise BenchError(f"{file} is missing: {WHAT_IS_NEEDED}")
    return read, asked


def _pretrain(
    read: Sequence[Path], folder: Path, size: BaseSize, progress: Progress
) -> dict[str, Any]:
    plays, rows = read[0].read_text("utf-8"), ChatRows(read[1:])
    examples = rows.read(range(len(rows)))
    texts = [turn.text for example in examples for turn in example.turns]
    tokenizer = _tokenizer([plays, *texts], folder / "tokenizer", size.vocabulary)
    form = plain(tokenizer)
    documents = [form.pieces(example.turns) for example in examples]
    ids = [[tokenizer.end or 0, *tokenizer.encode(part)] for part in _scenes(plays)]
    ids += [tokenizer.encode_pieces(document)[0] for document in documents]
    random.Random(_SEED).shuffle(ids)
    whole_N = torch.tensor([i for document in ids for i in document])
    held_out = _HELD_OUT * size.tokens
    if len(whole_N) < 2 * held_out:
        raise BenchError(f"{len(whole_N):,} tokens to read are too few; {WHAT_IS_NEEDED}")
    train_N, held_BT = whole_N[:-held_out], whole_N[-held_out:].view(_HELD_OUT, size.tokens)
    config = {
        "model_type": "llama", "vocab_size": tokenizer.size, "hidden_size": size.hidden,
        "intermediate_size": size.intermediate, "num_hidden_layers": size.layers,
        "num_attention_heads": 4, "max_position_embeddings": size.tokens,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.end, "eos_token_id": tokenizer.end,
    }  # fmt: skip
    step, cooldown = 0, size.cooldown * size.steps
    spec = InnerSpec(
        lr=size.lr, warmup_steps=min(50, size.steps // 4), batch_size=size.batch,
        ends="1970-01-01T12:00:00Z", cooldown_s=cooldown,
    )  # fmt: skip
    # A calendar on which a step takes a second, and which ends with the last.
    inner = Inner(
        seeded_model(config, _SEED), spec, torch.device("cpu"),
        clock=lambda: 12 * 3600.0 - (size.steps - step),
    )  # fmt: skip
    dice = torch.Generator().manual_seed(_SEED)
    for step in range(size.steps):
        starts = torch.randint(len(train_N) - size.tokens, (size.batch,), generator=dice)
        batch_BT = torch.stack([train_N[s : s + size.tokens] for s in starts.tolist()])
        loss = inner.step(batch_BT).loss
        if step % 100 == 99:
            progress(f"  step {step + 1} of {size.steps}: {loss:.3f}")
    inner.model.eval()
    loss = mean_loss(inner.model, torch.split(held_BT, 16), inner.device)
    save_model(inner.model, folder / "model")
    return {
        "parameters": sum(p.numel() for p in inner.model.parameters()), "loss": loss,
        "tokens_read": size.steps * size.batch * size.tokens, "config": config,
    }  # fmt: skip


def _scenes(plays: str) -> Iterator[str]:
    """Pieces of some speeches each, to be mixed with the rest."""
    speeches = plays.split("\n\n")
    for start in range(0, len(speeches), 16):
        yield "\n\n".join(speeches[start : start + 16])


def _tokenizer(texts: Sequence[str], folder: Path, vocabulary: int) -> FileTokenizer:
    """A byte-level BPE of these texts."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - 1, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    made.train_from_iterator(texts, trainer)
    made.add_special_tokens([AddedToken(_END, special=True)])
    folder.mkdir(parents=True)
    made.save(str(folder / "tokenizer.json"))
    return FileTokenizer(folder / "tokenizer.json")

"""Somebody's finetuning script with two lines more, as a process of its own.

    python -m tests.e2e.hook_script TOML HOME [--via ADDRESS] [--until FILE]

The first one starts the run of TOML, one with an address joins it; it trains until FILE is there.
Its peer's events are JSON lines on stdout, like those of `python -m peer join --log-json`; the last
line says what came of it.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from peer.cli.run import read_draft
from peer.hook import join_run
from peer.observe import events as ev
from peer.observe.hub import as_record
from tests.hook.script import Until, adapted, model, trainer


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("toml", type=Path)
    parser.add_argument("home", type=Path)
    parser.add_argument("--via")
    parser.add_argument("--until", type=Path)
    chosen = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell may have ignored
    run = read_draft(chosen.toml).manifest
    torch.set_num_threads(1)
    config = dict(run.model.config)
    made = adapted(run) if run.method.kind == "lora" else model(1, config)
    it = trainer(made, chosen.home / "out", learning_rate=run.inner.lr)
    before = it.evaluate(it.train_dataset)["eval_loss"]
    start = {"via": chosen.via} if chosen.via else {"run": chosen.toml}
    hook = join_run(**start, home=chosen.home, host="127.0.0.1", site="here")
    it.add_callback(hook)

    class Tell(Until):
        def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            assert hook.peer is not None
            for record in hook.peer.hub.recent():
                say(record)
            hook.peer.hub.listen(tell)

    def enough() -> bool:
        return chosen.until is not None and chosen.until.exists()

    it.add_callback(Tell(enough))
    try:
        it.train()
    except KeyboardInterrupt:
        return 0
    after = it.evaluate(it.train_dataset)["eval_loss"]
    say({"event": "Ended", "before": before, "after": after})
    return 0


def tell(event: ev.Event) -> None:
    say(as_record(event, time.time()))


def say(record: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(record, default=str) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())

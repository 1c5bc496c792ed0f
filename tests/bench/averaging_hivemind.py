"""The reference: one peer of hivemind's DecentralizedAverager, as its users would run it.

`gather` is its matchmaking, up to the moment when all that is left is the all-reduce: a step is
asked to wait for a trigger, which `average` pulls. Half-precision on the wire; its own 8-bit codec
reports success but averages nothing with numpy >= 2.4.
"""

from __future__ import annotations

import os
import tempfile
import time
from typing import Any, Final

# Its own switch: the default leaves 100 MB per peer in /dev/shm when a process is killed.
os.environ["HIVEMIND_MEMORY_SHARING_STRATEGY"] = "file_descriptor"

import hivemind
import torch
from hivemind.averaging.allreduce import AllreduceException
from hivemind.averaging.control import AveragingStage
from hivemind.averaging.matchmaking import MatchmakingException
from hivemind.compression import Float16Compression
from hivemind.p2p import P2P

from tests.bench.tensors import check, contribution
from tests.bench.worker import Reply, serve

_MATCHMAKING_S: Final = 1.0  # shortest that forms groups reliably; a full group starts sooner
_REQUEST_TIMEOUT_S: Final = 0.8  # must be smaller, or its matchmaking can deadlock
_ALLREDUCE_TIMEOUT_S: Final = 60.0
_STAGE_POLL_S: Final = 0.002
_GIVE_UP_S: Final = 15.0  # now and then its matchmaking forgets a peer and waits for ever
_TENSOR_VALUES: Final = 2**20  # as in a model: one large tensor takes it 1.3 times as long


class HivemindPeer:
    """The command handlers; see `tests.bench.averaging` for what each must do."""

    _averager: Any
    _step: Any
    _flat: Any

    def start(
        self, *, index: int, size: int, via: list[str], numel: int, seed: int,
        host: str = "127.0.0.1", matchmaking_s: float = _MATCHMAKING_S,
        request_timeout_s: float = _REQUEST_TIMEOUT_S,
    ) -> Reply:  # fmt: skip
        self._index, self._size, self._seed = index, size, seed
        # Its sockets go where the fleet tidies up.
        P2P._UNIX_SOCKET_PREFIX = f"/unix{tempfile.gettempdir()}/hivemind-"
        self._flat = torch.zeros(numel)  # its pieces are shared, and so it is
        self._dht = hivemind.DHT(
            initial_peers=via,
            start=True,
            host_maddrs=[f"/ip4/{host}/tcp/0"],
            use_relay=False,
            auto_nat=False,
            nat_port_map=False,
        )
        self._averager = hivemind.DecentralizedAverager(
            self._flat.split(_TENSOR_VALUES),
            self._dht,
            start=True,
            prefix="bench",
            target_group_size=size,
            min_group_size=size,
            min_matchmaking_time=matchmaking_s,
            request_timeout=request_timeout_s,
            allreduce_timeout=_ALLREDUCE_TIMEOUT_S,
            compression=Float16Compression(),
            allow_state_sharing=False,
        )
        return {"addresses": [str(address) for address in self._dht.get_visible_maddrs()]}

    def prepare(self, *, number: int) -> Reply:
        with self._averager.get_tensors():
            contribution(self._seed, number, self._index, self._flat.numpy())
        return {}

    def gather(self, *, number: int) -> Reply:
        self._step = self._averager.step(
            wait=False, require_trigger=True, allow_retries=False, timeout=_GIVE_UP_S
        )
        while self._step.stage in (AveragingStage.IDLE, AveragingStage.LOOKING_FOR_GROUP):
            time.sleep(_STAGE_POLL_S)
        # It awaits the trigger with a group or without: only the time tells.
        late = self._step.get_timeout() == 0 or self._step.stage == AveragingStage.FINISHED
        return {"failure": f"found no group in {_GIVE_UP_S:g} s"} if late else {}

    def cancel(self, *, number: int) -> Reply:
        self._step.cancel()
        return {}

    def average(self, *, number: int) -> Reply:
        self._step.allow_allreduce()
        try:
            group = self._step.result()
        except (AllreduceException, MatchmakingException, TimeoutError) as error:
            return {"failure": repr(error)}
        if len(group) != self._size:
            return {"failure": f"a group of {len(group)}"}
        return {}

    def verify(self, *, number: int, without: int | None = None) -> Reply:
        """Against the mean of all, or of all but one."""
        with self._averager.get_tensors():
            return check(self._seed, number, self._size, self._flat.numpy(), without).facts()


if __name__ == "__main__":
    torch.set_num_threads(1)
    peer = HivemindPeer()
    serve(
        {
            "start": peer.start,
            "prepare": peer.prepare,
            "gather": peer.gather,
            "cancel": peer.cancel,
            "average": peer.average,
            "verify": peer.verify,
        }
    )

"""A program for hosts: a TCP source or sink that does nothing else, at the price of few cycles.

    python traffic.py sink PORT            (reads and forgets, from any number of sources)
    python traffic.py source ADDRESS PORT [CONGESTION]
                                           (writes until it is killed, with the host's congestion
                                           control or the one that is named)

Nothing but the standard library is imported, so that it starts at once.
"""

from __future__ import annotations

import selectors
import socket
import sys

_BYTES = 2**18


def sink(port: int) -> None:
    buffer = memoryview(bytearray(_BYTES))
    with socket.create_server(("", port)) as door, selectors.DefaultSelector() as ready:
        ready.register(door, selectors.EVENT_READ)
        print("ready", flush=True)
        while True:
            for key, _ in ready.select():
                if key.fileobj is door:
                    ready.register(door.accept()[0], selectors.EVENT_READ)
                elif isinstance(key.fileobj, socket.socket) and not key.fileobj.recv_into(buffer):
                    ready.unregister(key.fileobj)
                    key.fileobj.close()


def source(address: str, port: int, congestion: str = "") -> None:
    with socket.create_connection((address, port)) as out:
        if congestion:
            out.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, congestion.encode())
        while True:
            out.sendall(bytes(_BYTES))


if __name__ == "__main__":
    if sys.argv[1] == "sink":
        sink(int(sys.argv[2]))
    else:
        source(sys.argv[2], int(sys.argv[3]), *sys.argv[4:])

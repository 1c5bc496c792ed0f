"""The network's rules as pure state machines: `handle(event, now_s) -> effects`.

Nothing here waits, reads a clock, rolls dice or opens a socket; nothing here imports torch,
asyncio, time or random. The same code runs over libp2p, in memory and in simulated time.
"""

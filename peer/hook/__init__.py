"""Somebody's own training script joins a run, with two lines more:

    from peer.hook import join_run
    trainer.add_callback(join_run(via="/ip4/..."))

The script keeps its model, data, optimiser and loop; a peer in a thread beside it takes what the
script has learned at the rounds' times, and adds what the others have, between two steps.
"""

from peer.hook.callback import RunCallback, join_run

__all__ = ["RunCallback", "join_run"]

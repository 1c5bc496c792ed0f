"""A wide-area network on one machine: hosts, lines, routers, loss and partitions.

`docs/netlab.md` says how to use it; `Lab` and the dataclasses of `spec` are all that a test needs.
"""

from tests.netlab.counters import Counters
from tests.netlab.lab import Lab, LabHost
from tests.netlab.namespaces import LabError
from tests.netlab.requirements import missing
from tests.netlab.spec import Forward, Host, Line, Nat, Plane, Route, Spec, nat_zoo, two_regions

__all__ = [
    "Counters", "Forward", "Host", "Lab", "LabError", "LabHost", "Line", "Nat", "Plane",
    "Route", "Spec", "missing", "nat_zoo", "two_regions",
]  # fmt: skip

"""Outer optimisers: what the mean D of a round's differences does to the parameters theta.

Nesterov (DiLoCo, arXiv 2311.08105):

    m     <- beta m + D
    theta <- theta - eta (D + beta m)

Delayed Nesterov (asynchronous Local-SGD, arXiv 2401.09135, algorithm 3, with c = 0), for rounds
that take in whoever is ready: each outcome moves theta by its own part at once, and the momentum
only once in `delay` outcomes, by their mean, because momentum that follows every straggler's late
difference overshoots:

    B <- B + D;  t <- t + 1
    t < delay:   theta <- theta - eta D / delay
    t = delay:   m <- beta m + B / delay;  theta <- theta - eta (beta m + D / delay);  B, t <- 0

Of the local-update family (`peer/finetune/updates.py` has the clients' side), Adaptive Federated
Optimization, arXiv 2003.00295, and Measuring the Effects of Non-Identical Data Distribution,
arXiv 1909.06335:

    FedAvg    theta <- theta - eta D
    FedAvgM   m <- beta m + D;  theta <- theta - eta m
    FedAdam   m <- beta m + (1 - beta) D;  v <- beta2 v + (1 - beta2) D^2
              theta <- theta - eta m / (sqrt(v) + tau)          not corrected for its start at zero

In float32 with separate NumPy operations, unit by unit: the same bits on every machine, since IEEE
754 fixes each of them and nothing is fused.

Shapes: N = all parameters, U = values of one unit, K = units.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]


class Outer(Protocol):
    """An outer optimiser over a flat vector."""

    arrays: dict[str, Float32]
    """Its memory: part of the outer state, the same on every peer."""

    def step(self, unit: int, where: slice, theta_U: Float32, mean_U: Float32) -> None:
        """Move `theta_U`, the unit's values at `where`; `mean_U` may be overwritten."""


class Nesterov:
    """See the module. One vector of memory."""

    def __init__(self, numel: int, largest: int, lr: float, momentum: float) -> None:
        """`largest`: values in the largest unit."""
        self._m_N = np.zeros(numel, np.float32)
        self.arrays: dict[str, Float32] = {"momentum": self._m_N}
        self._lr = np.float32(lr)
        self._beta = np.float32(momentum)
        self._look = np.empty(largest, np.float32)

    def step(self, unit: int, where: slice, theta_U: Float32, mean_U: Float32) -> None:
        """See `Outer.step`."""
        m_U, look_U = self._m_N[where], self._look[: len(theta_U)]
        np.multiply(m_U, self._beta, out=m_U)
        np.add(m_U, mean_U, out=m_U)
        np.multiply(m_U, self._beta, out=look_U)
        np.add(look_U, mean_U, out=look_U)
        np.multiply(look_U, self._lr, out=look_U)
        np.subtract(theta_U, look_U, out=theta_U)


class DelayedNesterov:
    """See the module. Two vectors of memory, and how many outcomes each unit has seen."""

    def __init__(
        self, numel: int, units: int, largest: int, lr: float, momentum: float, delay: int
    ) -> None:
        """`delay`: outcomes from one change of the momentum to the next."""
        self._m_N = np.zeros(numel, np.float32)
        self._buffer_N = np.zeros(numel, np.float32)
        self._seen_K = np.zeros(units, np.float32)
        self.arrays: dict[str, Float32] = {
            "momentum": self._m_N,
            "buffer": self._buffer_N,
            "seen": self._seen_K,
        }
        self._lr = np.float32(lr)
        self._beta = np.float32(momentum)
        self._delay = delay
        self._share = np.float32(1.0 / delay)
        self._look = np.empty(largest, np.float32)

    def step(self, unit: int, where: slice, theta_U: Float32, mean_U: Float32) -> None:
        """See `Outer.step`."""
        m_U, buffer_U = self._m_N[where], self._buffer_N[where]
        look_U = self._look[: len(theta_U)]
        np.add(buffer_U, mean_U, out=buffer_U)
        np.multiply(mean_U, self._share, out=look_U)
        seen = int(self._seen_K[unit]) + 1
        if seen >= self._delay:
            np.multiply(buffer_U, self._share, out=buffer_U)
            np.multiply(m_U, self._beta, out=m_U)
            np.add(m_U, buffer_U, out=m_U)
            np.multiply(m_U, self._beta, out=mean_U)
            np.add(look_U, mean_U, out=look_U)
            buffer_U[:] = 0
            seen = 0
        self._seen_K[unit] = seen
        np.multiply(look_U, self._lr, out=look_U)
        np.subtract(theta_U, look_U, out=theta_U)


class FedAvg:
    """See the module. No memory."""

    def __init__(self, lr: float) -> None:
        self.arrays: dict[str, Float32] = {}
        self._lr = np.float32(lr)

    def step(self, unit: int, where: slice, theta_U: Float32, mean_U: Float32) -> None:
        """See `Outer.step`."""
        np.multiply(mean_U, self._lr, out=mean_U)
        np.subtract(theta_U, mean_U, out=theta_U)


class FedAvgM:
    """See the module. One vector of memory."""

    def __init__(self, numel: int, lr: float, momentum: float) -> None:
        self._m_N = np.zeros(numel, np.float32)
        self.arrays: dict[str, Float32] = {"momentum": self._m_N}
        self._lr = np.float32(lr)
        self._beta = np.float32(momentum)

    def step(self, unit: int, where: slice, theta_U: Float32, mean_U: Float32) -> None:
        """See `Outer.step`."""
        m_U = self._m_N[where]
        np.multiply(m_U, self._beta, out=m_U)
        np.add(m_U, mean_U, out=m_U)
        np.multiply(m_U, self._lr, out=mean_U)
        np.subtract(theta_U, mean_U, out=theta_U)


class FedAdam:
    """See the module. Two vectors of memory."""

    def __init__(
        self, numel: int, largest: int, lr: float, momentum: float, beta2: float, tau: float
    ) -> None:
        """`largest`: values in the largest unit. `tau`: what keeps steps of tiny D small, > 0."""
        self._m_N = np.zeros(numel, np.float32)
        self._v_N = np.zeros(numel, np.float32)
        self.arrays: dict[str, Float32] = {"momentum": self._m_N, "variance": self._v_N}
        self._lr = np.float32(lr)
        self._beta = np.float32(momentum)
        self._new = np.float32(1.0 - momentum)
        self._beta2 = np.float32(beta2)
        self._new2 = np.float32(1.0 - beta2)
        self._tau = np.float32(tau)
        self._look = np.empty(largest, np.float32)

    def step(self, unit: int, where: slice, theta_U: Float32, mean_U: Float32) -> None:
        """See `Outer.step`."""
        m_U, v_U = self._m_N[where], self._v_N[where]
        look_U = self._look[: len(theta_U)]
        np.multiply(mean_U, mean_U, out=look_U)
        np.multiply(look_U, self._new2, out=look_U)
        np.multiply(v_U, self._beta2, out=v_U)
        np.add(v_U, look_U, out=v_U)
        np.multiply(mean_U, self._new, out=mean_U)
        np.multiply(m_U, self._beta, out=m_U)
        np.add(m_U, mean_U, out=m_U)
        np.sqrt(v_U, out=look_U)
        np.add(look_U, self._tau, out=look_U)
        np.divide(m_U, look_U, out=look_U)
        np.multiply(look_U, self._lr, out=look_U)
        np.subtract(theta_U, look_U, out=theta_U)

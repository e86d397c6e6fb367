"""Named random streams: randomness is an argument, and every use of it has its own name.

A stream is a 64-bit key. `child` derives a new key from names ("rollouts", 3, ...), so no use of randomness
can move another one. Uniforms are *counter based*: entry (row, step) is a hash of (key, row, step), not the
next number of a hidden state. Three things follow: a row's draws do not depend on which rows share its batch,
nothing random needs saving in a checkpoint, and the same run twice on CPU is bitwise the same run.

The hash is the finaliser of SplitMix64 (Steele, Lea & Flood, OOPSLA 2014), applied once per coordinate.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(z: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser, elementwise on uint64 (arithmetic modulo 2^64)."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@dataclass(frozen=True)
class Stream:
    """A named source of randomness. Equal keys give equal numbers, on every machine."""

    key: int

    def child(self, *names: object) -> Stream:
        """The stream called `names` under this one."""
        escaped = (str(name).replace("%", "%25").replace("/", "%2F") for name in names)
        text = "/".join([f"{self.key:016x}", *escaped])
        return Stream(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big"))

    def uniform(self, rows: Tensor | Sequence[int], steps: int | Sequence[int]) -> Tensor:
        """Uniforms in the open interval (0, 1), float64, shape [len(rows), number of steps].

        `rows` are the rows' own numbers (not their places in a batch); `steps` is a count (0, 1, …) or a list.
        """
        row = np.asarray(rows, dtype=np.int64).astype(np.uint64).reshape(-1, 1)
        step = np.arange(steps) if isinstance(steps, int) else np.asarray(steps)
        step = step.astype(np.uint64).reshape(1, -1)
        with np.errstate(over="ignore"):
            z = _mix(np.uint64(self.key) + (row + np.uint64(1)) * _GOLDEN)
            z = _mix(z + (step + np.uint64(1)) * _GOLDEN)
        return torch.from_numpy(((z >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52)

    def generator(self, device: torch.device | str = "cpu") -> torch.Generator:
        """A torch generator seeded by this stream's key."""
        return torch.Generator(device=device).manual_seed(self.key & 0x7FFF_FFFF_FFFF_FFFF)

    def numpy(self) -> np.random.Generator:
        """A numpy generator seeded by this stream's key."""
        return np.random.default_rng(self.key)

    def permutation(self, n: int) -> Tensor:
        """A random order of 0 … n−1, int64 [n]."""
        return torch.randperm(n, generator=self.generator())

    def seed_everything(self) -> None:
        """Seed torch's global generators, for the code that knows no other (dropout, initialisation)."""
        seeded = torch.manual_seed if _accelerated() else torch.default_generator.manual_seed
        seeded(self.key & 0x7FFF_FFFF_FFFF_FFFF)


@cache
def _accelerated() -> bool:
    """Whether other generators than the CPU's are there: to seed those that are not takes a millisecond of every step."""
    return torch.accelerator.is_available()


def stream(seed: int, *names: object) -> Stream:
    """The stream called `names` under the user's `seed`."""
    return Stream(seed & 0xFFFF_FFFF_FFFF_FFFF).child(*names)

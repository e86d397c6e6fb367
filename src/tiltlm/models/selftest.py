"""A family's self-test: every way of running a body against one plain forward pass of each row alone.

Plain means: one row, no padding, no cache, no position ids; the network as its makers call it. On a few random rows of
unequal length the test asks, in this order,

    causal    a token's state does not change with what comes after it                    else refused
    scoring   right-padded rows and batch mates change nothing                            else rows of one length together
    cache     prompts padded on the left, tokens appended one by one, rows selected with
              repeats, rows of one length without a mask                                  else full forward passes
    peek      several candidates behind one prefix in one pass                            else a row for each
    sharing   prompts run once for all rows that answer them                              else each row by itself

An error is measured against what it could hide: the change of a state when the tokens before it are others. So a freshly
initialised network, whose context hardly matters yet, is judged as strictly as a trained one. What was found
holds for a configuration, not for weights: it is kept in the process and in a small file in the user's cache folder.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import tiltlm
from tiltlm.models.backbone import BackboneState, hidden, hidden_of
from tiltlm.models.body import SCATTERED, Trust, body_of, call, most_positions, trust_of
from tiltlm.models.look import evaluating, one_line
from tiltlm.progress import note
from tiltlm.samples import Samples, Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WIDEST = 256
"""The widest window or chunk of attention (tokens) that the test's rows reach beyond."""

TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-3}
"""Error allowed, relative to the effect of context; half precisions: 0.15."""

LARGE = 50_000_000
"""Parameters beyond which a network is tested as it is, however little its context matters."""

_FOUND: dict[str, Trust] = {}
_SAID: set[str] = set()


def examine(model: PreTrainedModel) -> Trust:
    """How `model` may be run; found by a test before its first use, and remembered.

    Raises ValueError, by name and reason, for a network that cannot be used at all. Says once where a cache is not
    trusted. A network whose layers are scattered was examined while it was whole, and carries what was found.
    """
    key = _key(model)
    carried = vars(model).get("tiltlm_trust") if SCATTERED in vars(model) else None
    trust = carried or _FOUND.get(key) or _read(key)
    if trust is None:
        trust = run(model)
        _write(key, trust)
    _FOUND[key] = trust
    vars(model)["tiltlm_trust"] = trust
    name = type(model).__name__
    if trust.refused:
        raise ValueError(f"{name} cannot be used: {trust.refused}")
    if not trust.cache and name not in _SAID:
        _SAID.add(name)
        note(f"{name} is drawn from by full forward passes, slower and right: {trust.why}")
    return trust


def run(model: PreTrainedModel) -> Trust:
    """The self-test itself, whatever was found before; `model` is left as it was."""
    before = trust_of(model)
    device = next(model.parameters()).device
    plainly = torch.autocast(device.type, enabled=False)
    with torch.no_grad(), torch.random.fork_rng(devices=[]), evaluating(model), plainly:
        try:
            return _telling(model).trust()
        except Exception as error:  # foreign code: whatever it raises on plain rows, it cannot be used
            return Trust(refused=f"it fails on plain rows of tokens ({one_line(error)})")
        finally:
            vars(model)["tiltlm_trust"] = before


def _telling(model: PreTrainedModel) -> _Test:
    """A test of `model`, or of a copy with noise in its weights where those are so small that context has no effect."""
    test = _Test(model)
    if test.effect > 1e-3 or sum(p.numel() for p in model.parameters()) > LARGE:
        return test
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    for parameter in other.parameters():
        parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return _Test(other)


class Mismatch(Exception):
    """One way of running a body gave other states than a plain pass."""


@dataclass
class _Test:
    """Rows, what plain passes make of them, and the comparisons."""

    model: PreTrainedModel
    plain: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        config: Any = self.model.config.get_text_config()
        self.device = next(self.model.parameters()).device
        longest = min(_reach(config.to_dict()) + 8, most_positions(self.model) or 10**9)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(1, int(config.vocab_size), (8, longest), generator=generator)
        self.rows: list[list[int]] = ids.tolist()
        whole = self.states(self.rows[0])
        other = self.states([*self.rows[1][:-1], self.rows[0][-1]])
        self.effect = _rms(whole[-1] - other[-1])
        self.tolerance = TOLERANCE.get(whole.dtype, 0.15) * max(self.effect, 1e-12)

    # ---- what is compared with what ------------------------------------------------------------------------

    def states(self, row: Sequence[int]) -> Tensor:
        """Plain states [L, D] of a row; a prefix's are those of a longer row (the network is causal)."""
        key = tuple(row)
        for known, states in self.plain.items():
            if known[: len(key)] == key:
                return states[: len(key)]
        ids = torch.tensor([list(row)], device=self.device)
        self.plain[key] = call(body_of(self.model), input_ids=ids, use_cache=False).last_hidden_state[0]
        return self.plain[key]

    def equal(self, ours: Tensor, plain: Tensor) -> None:
        """Both [M, D]. Raises Mismatch."""
        error = _rms(ours - plain)
        if not error <= self.tolerance:
            share = error / max(self.effect, 1e-12)
            raise Mismatch(f"its states differ from a plain pass by {share:.1e} of context's effect")

    def last(self, state: Any, rows: list[list[int]]) -> None:
        """The state's last hidden states against those of `rows`. Raises Mismatch."""
        self.equal(state.last, torch.stack([self.states(row)[-1] for row in rows]))

    # ---- the questions -------------------------------------------------------------------------------------

    def trust(self) -> Trust:
        """All questions, one after the other."""
        if why := self.fails(Trust(), self.causal):
            return Trust(refused=f"it is not causal ({why})")
        for trust in (
            Trust(),
            Trust(positions=False),
            Trust(padding=False),
            Trust(positions=False, padding=False),
        ):
            if not (why := self.fails(trust, self.scoring)):
                break
        else:
            return Trust(refused=f"rows of a batch change each other ({why})")
        chunk = getattr(self.model.config.get_text_config(), "attention_chunk_size", None) or 0
        trust = replace(trust, reach=chunk if chunk > WIDEST else None)
        why = self.fails(trust, self.cached)
        if why:
            return replace(
                trust, cache=False, peek=False, sharing=False, why=f"its cache is not to be trusted ({why})"
            )
        peek, sharing = not self.fails(trust, self.peeked), not self.fails(trust, self.shared)
        return replace(trust, peek=peek, sharing=sharing)

    def fails(self, trust: Trust, question: Callable[[], None]) -> str:
        """Why not, if the answer is no under `trust`; else nothing."""
        vars(self.model)["tiltlm_trust"] = trust
        try:
            question()
        except Mismatch as error:
            return str(error)
        except Exception as error:  # foreign code, called in a way it may not know
            return one_line(error)
        return ""

    def causal(self) -> None:
        row = self.rows[0]
        for length in (len(row) - 1, len(row) // 2):
            ids = torch.tensor([row[:length]], device=self.device)
            part = call(body_of(self.model), input_ids=ids, use_cache=False).last_hidden_state[0]
            self.equal(part, self.states(row)[:length])

    def scoring(self) -> None:
        longest = len(self.rows[0])
        rows = [self.rows[k][:length] for k, length in enumerate((longest, 3, longest, 1, 3, longest // 2))]
        found = hidden(self.model, self._tokens(rows))
        for row, states in zip(rows, found, strict=True):
            self.equal(states[: len(row)], self.states(row))

    def cached(self) -> None:
        longest = len(self.rows[0])
        for lengths in ((longest - 4, 1, longest - 6, 3), (longest - 4, longest - 4, longest - 4, longest - 4)):
            rows = [self.rows[k][:length] for k, length in enumerate(lengths)]
            state = BackboneState(self.model, self._tokens(rows), 3)
            self.last(state, rows)
            for index, column in (([3, 0, 0, 2], 4), ([0, 1, 2, 3], 5), ([2, 1, 2], 6)):
                rows = [[*rows[k], self.rows[column][n]] for n, k in enumerate(index)]
                state.select(torch.tensor(index, device=self.device))
                state.append(torch.tensor([row[-1] for row in rows], device=self.device))
                self.last(state, rows)

    def peeked(self) -> None:
        rows = [self.rows[k][:length] for k, length in enumerate((6, 1, 4))]
        candidates = torch.tensor([self.rows[4 + k][:2] for k in range(3)], device=self.device)
        state = BackboneState(self.model, self._tokens(rows), 2)
        found = state.peek(candidates)
        for row, tokens, states in zip(rows, candidates.tolist(), found, strict=True):
            self.equal(states, torch.stack([self.states([*row, token])[-1] for token in tokens]))
        state.append(candidates[:, 1])
        self.last(state, [[*row, token] for row, token in zip(rows, candidates[:, 1].tolist(), strict=True)])

    def shared(self) -> None:
        prompts, answers = [self.rows[0][:5], self.rows[1][:2]], [self.rows[k][:3] for k in range(2, 8)]
        index, done = torch.tensor([0, 1, 0, 1, 0, 1], device=self.device), self._tokens(answers)
        found = hidden_of(self.model, Samples(self._tokens(prompts), index, done.ids, done.mask))
        for k, answer, states in zip(index.tolist(), answers, found, strict=True):
            row = prompts[k] + answer
            self.equal(states[: len(row)], self.states(row))

    def _tokens(self, rows: list[list[int]]) -> Tokens:
        return Tokens.of(rows, self.device)


def _rms(x: Tensor) -> float:
    """The largest root mean square of any state in `x`."""
    return float(x.double().square().mean(-1).sqrt().max()) if x.numel() else 0.0


def _reach(config: dict[str, Any]) -> int:
    """The widest window, chunk or block of attention that rows can be made to reach beyond, in tokens."""
    names = [name for name in config if any(word in name for word in ("window", "chunk", "block_size"))]
    sizes = [config[name] for name in names if isinstance(config[name], int)]
    return max([4, *(size for size in sizes if size <= WIDEST)])


# ---- what is remembered ------------------------------------------------------------------------------------


def _key(model: PreTrainedModel) -> str:
    """A hash of what the result depends on: configuration, dtype, versions, and the code that is tested."""
    import transformers

    config = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "dtype")}
    parts = [json.dumps(config, sort_keys=True, default=str), type(model).__name__, str(model.dtype)]
    parts += [str(model.config._attn_implementation), next(model.parameters()).device.type]
    parts += [tiltlm.__version__, torch.__version__, transformers.__version__, _code()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]


def _code() -> str:
    """A hash of the source of the ways that are tested."""
    files = [Path(__file__).with_name(f"{name}.py") for name in ("backbone", "body", "cache", "selftest")]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def _file(key: str) -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "tiltlm" / "selftest" / f"{key}.json"


def _read(key: str) -> Trust | None:
    try:
        return Trust(**json.loads(_file(key).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RuntimeError):  # none yet, not readable, or no home at all
        return None


def _write(key: str, trust: Trust) -> None:
    """Keep what was found; a cache folder that cannot be written costs the next process a self-test, no more."""
    try:
        path = _file(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f"{path.name}.{os.getpid()}")
        aside.write_text(json.dumps(asdict(trust)), encoding="utf-8")
        aside.replace(path)
    except (OSError, RuntimeError):
        return

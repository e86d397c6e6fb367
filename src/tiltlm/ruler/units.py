"""What the ruler's metrics are measured in, and which of them are bounds."""

from __future__ import annotations

UNITS = {
    "reward": "reward",
    "objective": "reward",
    "objective_gap": "reward",
    "kl_to_reference": "nats",
    "kl_to_target": "nats",
    "kl_to_target_at_least": "nats",
    "kl_to_reference_at_most": "nats",
    "kl_to_target_at_most": "nats",
    "objective_at_least": "reward",
    "tries": "draws",
    "kl_from_target": "nats",
    "log_w": "nats",
    "log_w_exact": "nats",
    "pareto_k": "",
    "log_z": "nats",
    "forced_loss": "nats",
    "length": "tokens",
}
"""Units of the ruler's own metrics, and of a completion's length; what else a task checks is a rate."""

AT_MOST = ("kl_to_reference_at_most", "kl_to_target_at_most")
"""Upper bounds: how far the truth lies below is not known."""

AT_LEAST = ("kl_to_target_at_least", "objective_at_least")


def unit_of(metric: str) -> str:
    if metric.startswith("reward["):  # a term of a sum of rewards
        return "reward"
    return "nats" if metric.startswith("value_loss") else UNITS.get(metric, "rate")

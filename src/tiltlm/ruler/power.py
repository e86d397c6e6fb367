"""What a comparison of two accuracies can show, before it is made.

    least = (z_0.975 + z_0.8)·sqrt(d/n) = 2.802·sqrt(d/n)          n questions, d: variance of one question's difference

The true difference that a two-sided test at 5% shows four times in five. With one answer a question d is the discordance:
the share of questions that one model answers right and the other does not (less the square of the difference, which is
left out). Of K sampled answers a question, averaged, each of the two averages varies by p(1 − p)/K on a question that is
answered right with probability p, so d ≥ 2·E[p(1 − p)]/K: equal for two models that have the same p on every question.
The normal law stands for the tests' own; from a hundred questions on that is no matter.
"""

from __future__ import annotations

import math

from tiltlm.ruler.compare import LEVEL, POWER


def normal_errors() -> float:
    """How many standard errors a difference must have to be shown four times in five: 2.802."""
    from scipy.special import ndtri

    return float(ndtri(1 - LEVEL / 2) + ndtri(POWER))


def least_difference(questions: int, discordance: float) -> float:
    """The smallest true difference of two accuracies that n shared questions show with 80% power at 5%.

    Raises ValueError for no questions, or a discordance that is no variance of a difference (above 0, at most 1).
    """
    if questions < 1:
        raise ValueError(f"a comparison needs one question or more; got {questions}")
    return normal_errors() * math.sqrt(_checked(discordance) / questions)


def questions_needed(difference: float, discordance: float) -> int:
    """How many shared questions show a true difference of two accuracies (0.01: one point) with 80% power at 5%."""
    if not 0 < difference <= 1:
        raise ValueError(
            f"a difference of two accuracies lies above 0 and is at most 1 (0.01: a point); got {difference}"
        )
    return math.ceil(normal_errors() ** 2 * _checked(discordance) / difference**2)


def discordance_of_samples(disagreement: float, samples: int) -> float:
    """2·E[p(1 − p)]/K, the least d of two averages of K sampled answers a question.

    disagreement: E[p(1 − p)] over questions, at most ¼; two samples of one model disagree on twice that share.
    """
    if samples < 1:
        raise ValueError(f"an average is one of 1 sample a question or more; got {samples}")
    if not 0 < disagreement <= 0.25:
        raise ValueError(f"E[p(1 − p)] lies above 0 and is at most 0.25; got {disagreement}")
    return 2 * disagreement / samples


def before_a_run(questions: int, discordance: float) -> str:
    """One line to print before a run: what its comparison with another one can show."""
    least = least_difference(questions, discordance)
    return (
        f"{questions:,} questions at a discordance of {discordance:.3g} show a difference of {100 * least:.2f} points four "
        f"times in five (5%, two-sided); 1 point needs {questions_needed(0.01, discordance):,}"
    )


def _checked(discordance: float) -> float:
    if not 0 < discordance <= 1:
        raise ValueError(
            f"a discordance is the share of questions on which two models differ, above 0 and at most 1; got {discordance}"
        )
    return discordance

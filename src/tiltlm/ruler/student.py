"""Student's t: the law of a mean of n normal observations over its own standard error, with n − 1 degrees of freedom."""

from __future__ import annotations


def t_975(freedom: int) -> float:
    """The 97.5% quantile: how many standard errors a 95% interval reaches to either side."""
    from scipy.special import stdtrit

    if freedom < 1:
        raise ValueError(f"Student's t wants at least one degree of freedom; got {freedom}")
    return float(stdtrit(freedom, 0.975))


def errors(normal: float, freedom: int) -> float:
    """What `normal` standard errors of a known spread are worth where n = freedom + 1 observations tell it: 3 with 19
    degrees of freedom are 3.45."""
    from scipy.special import ndtr, stdtrit

    return float(stdtrit(freedom, ndtr(normal)))

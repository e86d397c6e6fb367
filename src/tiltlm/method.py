"""What a method is to the rest of the library: settings, an objective, and a few facts about itself.

    fed      what it learns from (`problem.Fed`)
    trains   what it trains: a policy, a twist, a value (the law of the reward), or nothing
    optimum  where its expected gradient vanishes, and whether that is pi*

A method is a frozen dataclass in a file of its own (`policies/`, `twists/`, `samplers/`); its fields are its settings.
Learning and measuring ask it four things, and the defaults here answer for most: the objective for a problem, what is
trained on its behalf, the language model it decodes with, and why it cannot be used. `methods.py` gives names.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

from tiltlm.models.base import LanguageModel, Values
from tiltlm.objective import Objective
from tiltlm.problem import Facts, Fed, Problem, Source
from tiltlm.samplers.scenes import Scene
from tiltlm.seeds import Stream

Trains = Literal["policy", "twist", "value", "nothing"]


@dataclass(frozen=True)
class Learner:
    """What is trained.

    module     the network as it is trained, saved and restored
    policy     the language model that draws with its parameters, where a policy is trained
    values     the values, where a twist or a value is trained
    critic     the critic, where the method has one
    """

    module: Any
    policy: LanguageModel | None = None
    values: Values | None = None
    critic: Any = None


@dataclass(frozen=True)
class Lesson:
    """What an experience is made of, for methods that add something of their own to it.

    problem, learner; scene: the prompts of a step; n: draws of each; stream: of this method's draws; live: whether the
    rows are the policy's own, drawn at every step, with its log-probabilities of them.
    """

    problem: Problem
    learner: Learner
    scene: Scene
    n: int
    stream: Stream
    live: bool = False


class Method:
    """The answers of most methods."""

    fed: ClassVar[Fed] = "nothing"
    trains: ClassVar[Trains] = "nothing"
    optimum: ClassVar[str] = ""
    critic: ClassVar[bool] = False
    """Whether it trains a critic beside its policy."""

    judged: ClassVar[bool] = False
    """Whether a judge scores its rows, in the place of the reward."""

    asks: ClassVar[bool] = False
    """Whether it asks the reward of further draws, beside those that it learns from."""

    source: ClassVar[Source | None] = None
    """Where its rows come from if the feed does not say; None: what the task takes first."""

    passes: int = 1
    """Updates per batch; a field of methods that make several."""

    def bound(self, beta: float) -> Self:
        """This method with the target's temperature where its own was left open (None)."""
        if getattr(self, "beta", 0.0) is None:
            return replace(self, beta=beta)  # type: ignore[type-var]
        return self

    def objective(self, problem: Problem) -> Objective:
        """What is minimised."""
        return self.bound(problem.beta)  # type: ignore[return-value]

    def trained(self) -> Method:
        """The method whose training this one decodes with: itself, or the value that several rules share."""
        return self

    @property
    def least(self) -> int:
        """Completions of one prompt that a batch must hold."""
        return 1

    @property
    def caution(self) -> str:
        """What is to be said once before it trains, whatever it learns from."""
        return ""

    def about(self, rows: Any) -> str:
        """What is to be said of the fixed rows that it is going to learn from."""
        return ""

    def experience(self, experience: Any, lesson: Lesson) -> Any:
        """`experience` as this method wants it (KTO adds a reference point, PPO its critic's values)."""
        return experience

    def decoder(self, problem: Problem, learner: Learner) -> LanguageModel:
        """What draws once `learner` has learnt."""
        if learner.policy is None:
            raise ValueError(f"{type(self).__name__} trains no policy, and says nothing of how to decode")
        return learner.policy

    def measured(self, problem: Problem, learner: Learner, ruler: Any) -> Any:
        """(Measurement, Samples) by `ruler` (`ruler.measure.Ruler`) of what this method draws."""
        return ruler.measure(self.decoder(problem, learner))

    @property
    def wants_reference(self) -> bool:
        """Whether live draws need the reference's log-probabilities."""
        return True

    def files(self) -> list[str]:
        """Files and folders that its settings name and whose content decides the result."""
        return []

    def why_not(self, facts: Facts) -> str | None:
        """Why this method is of no use for such a problem, or None."""
        return None


class Policy(Method):
    """A method that trains a policy."""

    trains: ClassVar[Trains] = "policy"

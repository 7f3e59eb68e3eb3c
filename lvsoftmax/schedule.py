"""Learning-rate schedules: a factor on every learning rate, as a function of where training stands."""

import math
from typing import Any, Protocol, final


class Schedule(Protocol):
    """What the training loop asks of a schedule; the defaults are those of a schedule without memory."""

    depends_on_budget: bool
    """True when ``factor`` looks at ``progress``: a run cannot be continued under a larger budget."""

    def factor(self, epoch: int, progress: float) -> float:
        """Return what multiplies the learning rates.

        Args:
            epoch: passes over the training text completed so far, 0 in the first.
            progress: share of the budget spent, in [0, 1].
        """
        ...

    def observe(self, valid_nll: float) -> None:
        """Take note of a validation: nats per token."""

    def state_dict(self) -> dict[str, Any]:
        """Return the memory, for a checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""


@final
class Constant(Schedule):
    """Always 1."""

    depends_on_budget = False

    def factor(self, epoch: int, progress: float) -> float:
        """Return 1."""
        return 1.0


@final
class Plateau(Schedule):
    """Divides the rate whenever ``patience`` validations in a row have not improved on the best.

    Args:
        divisor: what the rate is divided by.
        threshold: nats per token by which a validation must beat the best one to count as better.
        patience: validations in a row without an improvement before a division; the count then starts again.

    Raises:
        ValueError: an argument is out of range.
    """

    depends_on_budget = False

    def __init__(self, *, divisor: float = 4.0, threshold: float = 0.0, patience: int = 1) -> None:
        if not divisor > 1:
            raise ValueError(f"schedule.divisor={divisor}: must be greater than 1")
        if not threshold >= 0:
            raise ValueError(f"schedule.threshold={threshold}: must not be negative")
        if patience < 1:
            raise ValueError(f"schedule.patience={patience}: must be at least 1")
        self.divisor = divisor
        self.threshold = threshold
        self.patience = patience
        self._best = math.inf
        self._stale = 0
        self._divisions = 0

    def factor(self, epoch: int, progress: float) -> float:
        """Return ``divisor ** -n`` after ``n`` divisions."""
        return self.divisor**-self._divisions

    def observe(self, valid_nll: float) -> None:
        """Compare with the best validation so far."""
        if valid_nll < self._best - self.threshold:
            self._best, self._stale = valid_nll, 0
            return
        self._stale += 1
        if self._stale == self.patience:
            self._stale = 0
            self._divisions += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the best validation, the validations since, and the number of divisions."""
        return {"best": self._best, "stale": self._stale, "divisions": self._divisions}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self._best, self._stale, self._divisions = state["best"], state["stale"], state["divisions"]


@final
class Cosine(Schedule):
    """Rises linearly to 1 over the share ``warmup`` of the budget, then falls along half a cosine to ``final``.

    Loshchilov & Hutter 2017, SGDR, equation 5 without restarts; the warm-up is not in the paper.

    Args:
        warmup: share of the budget, in [0, 1).
        final: factor at the end of the budget, in [0, 1].

    Raises:
        ValueError: an argument is out of range.
    """

    depends_on_budget = True

    def __init__(self, *, warmup: float = 0.05, final: float = 0.0) -> None:
        if not 0 <= warmup < 1:
            raise ValueError(f"schedule.warmup={warmup}: must be in [0, 1), a share of the budget")
        if not 0 <= final <= 1:
            raise ValueError(f"schedule.final={final}: must be in [0, 1], a share of the learning rate")
        self.warmup = warmup
        self.final = final

    def factor(self, epoch: int, progress: float) -> float:
        """Return the height of the curve at ``progress``."""
        if progress < self.warmup:
            return progress / self.warmup
        angle = math.pi * (min(progress, 1.0) - self.warmup) / (1 - self.warmup)
        return self.final + (1 - self.final) * (1 + math.cos(angle)) / 2


@final
class Zaremba(Schedule):
    """1 for ``flat_epochs`` epochs, then multiplied by ``decay`` at the start of every further epoch.

    Zaremba, Sutskever & Vinyals 2014, Recurrent Neural Network Regularization, section 4.1: 4 and 1/2 (small), 6 and
    1/1.2 (medium), 14 and 1/1.15 (large).

    Args:
        flat_epochs: epochs at the full rate.
        decay: factor per epoch after them, in (0, 1].

    Raises:
        ValueError: an argument is out of range.
    """

    depends_on_budget = False

    def __init__(self, *, flat_epochs: int = 4, decay: float = 0.5) -> None:
        if flat_epochs < 0:
            raise ValueError(f"schedule.flat_epochs={flat_epochs}: must not be negative")
        if not 0 < decay <= 1:
            raise ValueError(f"schedule.decay={decay}: must be in (0, 1]")
        self.flat_epochs = flat_epochs
        self.decay = decay

    def factor(self, epoch: int, progress: float) -> float:
        """Return ``decay ** max(epoch + 1 - flat_epochs, 0)``."""
        return self.decay ** max(epoch + 1 - self.flat_epochs, 0)

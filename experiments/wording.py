"""Numbers as people read them. Units stay on the line of their number."""

import math

INFINITY = "∞"


def perplexity(value: float) -> str:
    """About four figures."""
    if math.isinf(value):
        return INFINITY
    return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}" if value < 1e7 else f"{value:.1e}"


def percent(value: float) -> str:
    """A relative difference."""
    if math.isinf(value):
        return INFINITY
    return f"{100 * value:+,.1f}\u00a0%".replace("-", "−")


def share(value: float) -> str:
    """A part of a whole."""
    return f"{100 * value:.0f}\u00a0%"


def most(value: float) -> str:
    """A part that is nearly the whole; only the whole is 100 %."""
    return f"{math.floor(10_000 * value) / 100:.2f}\u00a0%" if value < 1 else "100\u00a0%"


def sortable(value: float | None) -> str:
    """What a table's column is sorted by, as a script reads numbers."""
    return "" if value is None else "Infinity" if math.isinf(value) else str(value)


def nats(value: float, *, relative: bool) -> str:
    """A loss, or a difference of losses."""
    if math.isinf(value):
        return INFINITY
    return f"{value:+.3f}".replace("-", "−") if relative else f"{value:.3f}"


def times(value: float) -> str:
    """A ratio."""
    return f"{value:.1f}×" if value < 9.95 else f"{value:,.0f}×"


def power(exponent: float) -> str:
    """The exponent of a power law."""
    return f"{exponent:.2f}".replace("-", "−")


def whole(value: float) -> str:
    """A rate."""
    return f"{value:,.0f}"


def count(value: float) -> str:
    """A number of tokens or parameters."""
    if value >= 1e6 and value % 1e6 == 0:
        return f"{value / 1e6:,.0f}\u00a0M"
    return f"{value / 1e6:,.2f}\u00a0M" if value >= 1e6 else f"{value:,.0f}"


def large(value: float) -> str:
    """A number of operations: three figures and a power of a thousand."""
    for size, name in ((1e9, "\u00a0G"), (1e6, "\u00a0M"), (1e3, "\u00a0k")):
        if value >= 0.9995 * size:
            return figures(value / size) + name
    return figures(value)


def milliseconds(seconds: float) -> str:
    """A time of a step: three figures, in milliseconds, or seconds from one on."""
    return f"{figures(seconds)}\u00a0s" if seconds >= 0.9995 else f"{figures(1000 * seconds)}\u00a0ms"


def megabytes(value: float) -> str:
    """10^6 bytes."""
    return f"{value / 1e6:,.0f}\u00a0MB"


def duration(value: float) -> str:
    """Seconds, or minutes and seconds, or whole minutes."""
    minutes, seconds = divmod(round(value), 60)
    parts = [f"{minutes}\u00a0min"] * bool(minutes) + [f"{seconds}\u00a0s"] * bool(seconds or not minutes)
    return " ".join(parts)


def listing(parts: list[str]) -> str:
    """``a, b and c``."""
    return ", ".join(parts[:-1]) + " and " + parts[-1] if len(parts) > 1 else parts[0]


def figures(value: float, digits: int = 3) -> str:
    """A number to so many figures, without exponents: 1,230, 12.3, 0.00123."""
    rounded = float(f"{value:.{digits - 1}e}")
    decimals = digits - 1 - math.floor(math.log10(abs(rounded))) if rounded else 0
    return f"{rounded:,.{max(0, decimals)}f}"

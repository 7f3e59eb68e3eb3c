"""Time on the device that does the work."""

from time import perf_counter

import torch


class DeviceClock:
    """Adds up the time between marks: wall-clock on the CPU, events on CUDA, which need no synchronisation per step."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        self._spans: list = []

    def mark(self) -> "float | torch.cuda.Event":
        """Return a moment in the device's order of work."""
        if not self.cuda:
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def add(self, start: "float | torch.cuda.Event") -> None:
        """Add the span from ``start`` to now."""
        self._spans.append((start, self.mark()))

    def drain(self) -> float:
        """Return the seconds added since the last call."""
        spans, self._spans = self._spans, []
        if not self.cuda:
            return sum(stop - start for start, stop in spans)
        torch.cuda.synchronize(self.device)
        return sum(start.elapsed_time(stop) for start, stop in spans) / 1000

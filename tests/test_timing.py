"""Time on the device that does the work."""

from types import SimpleNamespace

import torch

from experiments.timing import DeviceClock


def test_on_cuda_events_lie_on_the_device_that_works(monkeypatch):
    """Not on the current one: nothing makes the device of a run that."""
    asked = []

    class Event:
        def __init__(self, *, enable_timing):
            assert enable_timing

        def record(self, stream):
            asked.append(stream)

        def elapsed_time(self, stop):
            return 1500.0

    fake = SimpleNamespace(Event=Event, current_stream=lambda device: device, synchronize=asked.append)
    monkeypatch.setattr(torch, "cuda", fake)
    device = torch.device("cuda:1")
    clock = DeviceClock(device)
    clock.add(clock.mark())
    assert clock.drain() == 1.5 and asked == [device] * 3
    assert clock.drain() == 0


def test_on_the_cpu_spans_add_up():
    clock = DeviceClock(torch.device("cpu"))
    start = clock.mark()
    clock.add(start)
    clock.add(start)
    assert 0 < clock.drain() < 60 and clock.drain() == 0

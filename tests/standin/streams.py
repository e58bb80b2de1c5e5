"""Streams and events: CuPy's classes, as far as they are used."""

from __future__ import annotations

import threading
from typing import Any

from standin.device import CUDARuntimeError, Device, Operation, Recording

installed: list[Device] = []
_thread = threading.local()


class Strict:
    """Names what isn't there."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"{type(self).__name__}.{name} is not among the few calls of CuPy that the stand-in offers"
        )


def device() -> Device:
    """The device of the test that is running."""
    if not installed:
        raise RuntimeError("the stand-in for CuPy is used outside of a test that installs it")
    return installed[-1]


class _NullStream:
    def __get__(self, instance: object, owner: type[Stream]) -> Stream:
        stream = object.__new__(owner)
        stream._device, stream._queue, stream.ptr = device(), device().null_queue, 0
        return stream


class Stream(Strict):
    """A queue of operations, run in order, at any time between the call and the moment when something waits."""

    null = _NullStream()

    def __init__(self, null: bool = False, non_blocking: bool = False, ptds: bool = False) -> None:
        if null or ptds or not non_blocking:
            raise TypeError("the stand-in has only Stream(non_blocking=True) and Stream.null")
        device().require()
        self._device = device()
        self._queue = self._device.new_queue()
        self.ptr = 0x1000 + self._queue.number

    def __enter__(self) -> Stream:
        _streams().append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _streams().pop()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and other._queue is self._queue

    def __hash__(self) -> int:
        return id(self._queue)

    def synchronize(self) -> None:
        self._device.require()
        self._device.drain(self._queue)

    def record(self, event: Event | None = None) -> Event:
        event = event or Event(disable_timing=True)
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        # an event that was never recorded holds nobody up
        if event._recording:
            self._device.enqueue(self._queue, Operation(waits_for=event._recording))


class Event(Strict):
    """A point in a stream: the last `record`."""

    def __init__(self, block: bool = False, disable_timing: bool = False, interprocess: bool = False) -> None:
        if interprocess:
            raise TypeError("the stand-in has no events between processes")
        device().require()
        self._device = device()
        self._timing = not disable_timing
        self._recording: Recording | None = None

    @property
    def done(self) -> bool:
        if not self._recording:
            return True
        with self._device.locked():
            answer = self._recording.done
            # who asks again and again must get there
            if not answer and self._device.schedule == "late":
                self._device._step(self._recording.queue)
            self._device.wander()
        return answer

    def record(self, stream: Stream | None = None) -> None:
        self._recording = self._device.record((stream or current_stream())._queue)

    def synchronize(self) -> None:
        if self._recording:
            self._device.drain(self._recording.queue, self._recording)
            self._device.wander()


def get_elapsed_time(start_event: Event, end_event: Event) -> float:
    """cupy.cuda.get_elapsed_time: milliseconds from when one was reached to when the other one was."""
    times = []
    for event in (start_event, end_event):
        if not event._timing or event._recording is None:
            raise CUDARuntimeError(400)
        if not event._recording.done:
            raise CUDARuntimeError(600)
        times.append(event._recording.at)
    return (times[1] - times[0]) * 1e3


def _streams() -> list[Stream]:
    # of this thread, in this test
    if getattr(_thread, "device", None) is not device():
        _thread.device, _thread.streams = device(), []
    return _thread.streams


def current_stream() -> Stream:
    return _streams()[-1] if _streams() else Stream.null

"""Signals that say a run is to end: they set a flag, so that it saves first."""

import signal

_STOPS = [  # Windows has no SIGUSR1
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)
]


class StopSignal:
    """A flag that SIGTERM or SIGINT sets, so that the loop can save and leave.

    SIGUSR1, which SLURM can send ahead of a time limit, counts too. A second SIGINT within the
    block interrupts at once. Used as a context manager, in the main thread; the handlers from
    before come back at its end.

    >>> with StopSignal() as stop:
    ...     signal.raise_signal(signal.SIGTERM)
    ...     print(stop.name)
    SIGTERM
    """

    def __init__(self) -> None:
        self.name = ""
        self._before: dict[int, object] = {}

    def __bool__(self) -> bool:
        return bool(self.name)

    def _handle(self, number: int, frame: object) -> None:
        self.name = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def __enter__(self) -> "StopSignal":
        for number in _STOPS:
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

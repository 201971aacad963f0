"""Handling of signals that stop a run."""

import contextlib
import signal


class StopSignal:
    """Records SIGINT or SIGTERM inside the `with` block; a second signal gets the default handling."""

    def __enter__(self):
        self.number, self.previous = 0, {}
        with contextlib.suppress(ValueError):  # not the main thread, which alone may set handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self.previous[number] = signal.signal(number, self._remember)
        return self

    def _remember(self, number, _frame):
        self.number = number
        self._restore()

    def _restore(self):
        while self.previous:
            signal.signal(*self.previous.popitem())

    def __exit__(self, *_):
        self._restore()

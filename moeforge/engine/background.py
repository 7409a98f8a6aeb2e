"""Owns threads that work beside the workers: how they begin, are told to stop, and are heard of."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from typing import TypeVar

Self = TypeVar("Self", bound="Background")


class Background(ABC):
    """Threads that run `_work` until it returns, fails or sees that it is to stop.

    Args:
        threads: how many.
    """

    def __init__(self, threads: int) -> None:
        self._change = threading.Condition()
        self._error: BaseException | None = None
        self._stop = False
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(threads)]

    def start(self) -> None:
        """Begin; worker processes are forked before."""
        for thread in self._threads:
            thread.start()

    def check(self) -> None:
        """Raise what went wrong in a thread, if anything did."""
        if self._error is not None:
            raise self._error

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *ended: object) -> None:
        with self._change:
            self._stop = True
            self._change.notify_all()

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            with self._change:
                self._error = error
                self._change.notify_all()

    @abstractmethod
    def _work(self) -> None:
        """Do what is to be done."""

"""Owns sharing torch's work among threads so that their number changes no bit of the result.

torch splits a product among its threads, and may then add up in another order. Here every piece of
work is done by one thread, whole, and there are several of them. Knows nothing of what is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

Done = TypeVar("Done")

multiplied = False
"""Threads of this process have multiplied matrices: a process forked from it must not, for MKL's
accounting of memory by thread can spin forever there (seen in 7 of 130 forks)."""

SMALL = 512
"""Hidden size below which a piece of work is too small for handing it out to pay."""


class Share(Protocol):
    """Does numbered pieces of work, in any order and at the same time."""

    def __call__(self, work: Callable[[int], Done], count: int) -> list[Done]:
        """Return what `work` returns for 0 to `count` - 1, in this order."""


def alone(work: Callable[[int], Done], count: int) -> list[Done]:
    """Do one piece after the other."""
    return [work(number) for number in range(count)]


@contextmanager
def workers(hidden: int, device: str = "cpu") -> Iterator[Share]:
    """Give as many threads as torch is told to use, each of which computes by itself.

    Args:
        hidden: width of what is computed with; of small matrices one thread does all.
        device: torch device; of a GPU one thread is enough.
    """
    global multiplied
    from concurrent.futures import ThreadPoolExecutor

    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if before == 1 or hidden < SMALL or device != "cpu":
            yield alone
            return
        multiplied = True
        with ThreadPoolExecutor(before) as pool:

            def share(work: Callable[[int], Done], count: int) -> list[Done]:
                def quietly(number: int) -> Done:
                    with torch.no_grad():  # which every thread has to be told
                        return work(number)

                return list(pool.map(quietly, range(count)))

            yield share
    finally:
        torch.set_num_threads(before)

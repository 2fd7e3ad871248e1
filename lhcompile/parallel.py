"""Keeping every core busy with work of its own.

The operations of a program are many and small. Threads that share one of them mostly wait for each other, and wait
long when the machine has other work; so pieces run side by side instead, one torch thread each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

import torch
from torch import nn

__all__ = ["one_thread", "side_by_side", "threads_for"]

SMALL = 3 * 10**7
"""Numbers in a module up to which its step runs in caches. Beyond, it waits for memory, of which one core cannot read
all that there is to be read."""
Item = TypeVar("Item")
Result = TypeVar("Result")


def side_by_side(work: Callable[[Item], Result], items: Iterable[Item], most: int | None = None) -> list[Result]:
    """work(item) for every item, in order; as many at once as torch has threads, or `most`, without gradients."""
    pieces, threads = list(items), torch.get_num_threads()
    workers = threads if most is None else min(threads, most)

    def quietly(item: Item) -> Result:
        with torch.no_grad():
            return work(item)

    if threads == 1 or len(pieces) == 1:
        return [quietly(item) for item in pieces]
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(quietly, pieces))
    finally:
        torch.set_num_threads(threads)


@contextmanager
def one_thread() -> Iterator[None]:
    """Work that comes in small steps, on one torch thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def threads_for(module: nn.Module) -> AbstractContextManager[None]:
    """A few tokens at a time through a module: on one torch thread where its products are small."""
    numbers = sum(tensor.numel() for tensor in (*module.parameters(), *module.buffers()))
    return one_thread() if numbers <= SMALL else nullcontext()

"""Much work at once, which ends as one: where one piece fails, the others have stopped before the error is out."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from typing import Any, TypeVar

S = TypeVar("S")
T = TypeVar("T")


async def together(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """What all of ``work`` returns, in its order.

    Raises:
        BaseException: of the first that raised, or the caller was cancelled; the others were cancelled and have ended, so that
            nothing writes after the error is out.
    """
    work = list(work)
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for one in work:
            one.close()  # those that never began
        raise


async def each(do: Callable[[S], Awaitable[T]], over: Sequence[S], concurrency: int) -> list[T]:
    """``do`` of each of ``over``, in its order, at most ``concurrency`` at a time; as :func:`together`."""
    free = asyncio.Semaphore(max(1, concurrency))

    async def one(value: S) -> T:
        async with free:
            return await do(value)

    return await together(one(value) for value in over)

"""Work side by side: in order, bounded, and over as a whole when one piece fails."""

from __future__ import annotations

import asyncio

import pytest

from evolve_dag.agent.together import each, together


def test_results_stand_in_the_order_of_the_work_whatever_ends_first() -> None:
    async def after(turns: int) -> int:
        for _ in range(turns):
            await asyncio.sleep(0)
        return turns

    assert asyncio.run(each(after, [5, 0, 3], 2)) == [5, 0, 3]
    assert asyncio.run(each(after, [], 2)) == []


@pytest.mark.parametrize(("concurrency", "most"), [(0, 1), (1, 1), (3, 3), (99, 6)])
def test_no_more_at_a_time_than_asked(concurrency: int, most: int) -> None:
    running, seen = 0, 0

    async def work(_: int) -> None:
        nonlocal running, seen
        running += 1
        seen = max(seen, running)
        await asyncio.sleep(0)
        running -= 1

    asyncio.run(each(work, range(6), concurrency))
    assert seen == most


def test_when_one_fails_the_others_have_ended_before_the_error_is_out() -> None:
    ended: list[str] = []

    async def fails() -> None:
        await asyncio.sleep(0)
        raise OSError("disk full")

    async def writes() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("writer")

    async def main() -> list[str]:
        with pytest.raises(OSError, match="disk full"):
            await together([writes(), fails()])
        return list(ended)

    assert asyncio.run(main()) == ["writer"]


def test_who_cancels_the_whole_cancels_every_piece() -> None:
    ended: list[int] = []

    async def waits(number: int) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(number)

    async def main() -> None:
        whole = asyncio.create_task(each(waits, [1, 2, 3], 2))
        await asyncio.sleep(0.01)
        whole.cancel()
        with pytest.raises(asyncio.CancelledError):
            await whole

    asyncio.run(main())
    assert sorted(ended) == [1, 2]  # the third never began

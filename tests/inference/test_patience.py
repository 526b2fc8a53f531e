from __future__ import annotations

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from evolve_dag.inference.patience import retry_after


def test_retry_after_as_it_is_written() -> None:
    in_a_minute = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
    assert retry_after({"retry-after": "3"}) == 3
    assert retry_after({"retry-after": "0.25"}) == 0.25
    assert retry_after({"retry-after-ms": "1500", "retry-after": "9"}) == 1.5
    assert retry_after({"retry-after": in_a_minute}) == pytest.approx(60, abs=3)
    assert retry_after({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0
    assert retry_after({"retry-after": "-5"}) == 0
    for unreadable in ("soon", "nan", ""):
        assert retry_after({"retry-after": unreadable}) is None
    assert retry_after({}) is None


@given(st.text(max_size=40) | st.from_regex(r"[A-Z][a-z]{2}, [0-9]{1,5} [A-Z][a-z]{2} [0-9]{1,6} [0-9:]{5,8} [-+][0-9]{2,20}"))
@example("²")
@example("1e400")
@example("Mon, 01 Jan 2001 00:00:00 -99999999999999999999")
def test_whatever_a_server_writes_is_a_wait_or_none(value: str) -> None:
    for name in ("retry-after", "retry-after-ms"):
        wait = retry_after({name: value})
        assert wait is None or wait >= 0

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from evolve_dag.errors import ModelError
from evolve_dag.inference.addresses import host_of, is_local, public_name


@given(st.builds(str.__add__, st.sampled_from(["http://", "https://", ""]), st.text(max_size=20)))
@example("http://[::1")
@example("http://host:port/v1")
@example("http://host:99999/v1")
@example("http://[v1.x]/")
def test_an_address_has_a_host_and_a_name_or_is_refused(address: str) -> None:
    try:
        host = host_of(address, "models.judge.endpoints")
    except ModelError:
        return
    is_local(host)
    assert host in public_name(address)


def test_names_hold_no_secret() -> None:
    assert public_name("https://me:hunter22@api.example:8443/v1?key=zzz") == "https://api.example:8443/v1"
    assert public_name("http://[::1]:8000/v1") == "http://[::1]:8000/v1"
    for address in ("me:hunter22@api.example/v1", "http://me:hunter22@[::1/v1", "ftp://api.example/?key=hunter22"):
        with pytest.raises(ModelError, match="is no http address") as caught:
            host_of(address, "models.policy.servers")
        assert "hunter22" not in str(caught.value)

"""Which device a model can be computed on."""

from __future__ import annotations

import pytest
import torch

from evolve_dag.errors import ModelError
from evolve_dag.inference.backends import check_device


def test_a_device_that_is_not_there_is_named_with_its_key() -> None:
    check_device("cpu")
    missing = "cuda:0" if not torch.cuda.is_available() else "mps"
    with pytest.raises(ModelError, match=f"runtime.device: {missing} cannot be used here") as caught:
        check_device(missing)
    assert "runtime.device" in caught.value.remedy

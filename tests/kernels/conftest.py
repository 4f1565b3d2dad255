"""Kernel tests run Triton's interpreter on a CPU, and the compiled kernels where there is a GPU."""

import pytest
import torch

import llava_kernels


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def triton_path():
    """Every op called in the test runs its Triton kernel."""
    with llava_kernels.implementation("triton"):
        yield


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def dtype(request) -> torch.dtype:
    if request.param is torch.bfloat16 and not torch.cuda.is_available():
        pytest.skip("Triton's interpreter is silently wrong in bfloat16; this needs a GPU")
    return request.param

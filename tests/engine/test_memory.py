import os

import torch

from llava_fast.engine.memory import free_bytes


def test_free_bytes_are_some_of_the_machine():
    assert 0 < free_bytes(torch.device("cpu")) <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

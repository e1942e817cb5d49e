"""What all tests share: a module leaves no process group behind for the next one in its worker."""

import sys

import pytest


@pytest.fixture(autouse=True, scope="module")
def _no_process_group_left():
    yield
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return
    parallel_state = sys.modules.get("megatron.core.parallel_state")
    if parallel_state is not None:
        parallel_state.destroy_model_parallel()
    distributed.destroy_process_group()

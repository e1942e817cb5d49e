"""What all tests share: a module leaves no process group and no patch of the host's behind for the next one in its worker."""

import os
import sys

import pytest

# A name that is no folder would be asked for on the network, again and again; no test may depend on what is there.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True, scope="module")
def _no_process_group_left():
    yield
    _unwrap_data_fetchers()
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return
    parallel_state = sys.modules.get("megatron.core.parallel_state")
    if parallel_state is not None:
        parallel_state.destroy_model_parallel()
    distributed.destroy_process_group()


def _unwrap_data_fetchers():
    """NeMo's strategy wraps Lightning's choice of data fetchers for good, and what it leaves serves no other strategy."""
    for name in ("fit_loop", "evaluation_loop", "prediction_loop"):
        loop = sys.modules.get(f"lightning.pytorch.loops.{name}")
        while loop is not None and hasattr(loop._select_data_fetcher, "__wrapped__"):
            loop._select_data_fetcher = loop._select_data_fetcher.__wrapped__

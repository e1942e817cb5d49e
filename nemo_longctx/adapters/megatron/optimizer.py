"""Joints to Megatron-Core's optimizer: a word before each update, and checkpoints of the distributed one over torch's AdamW.

Without Transformer Engine and apex the distributed optimizer runs torch's AdamW, whose state has a 0-dimensional `step` for
each parameter. Megatron-Core 0.15 takes it for one more sharded tensor, and on loading gives all parameters one and the same.
Later releases keep it apart, as is done here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


def ask_before_updates(optimizer: Any, permit: Callable[[float], bool]) -> None:
    """Let `permit` see the norm of the whole gradient, before clipping, and decide whether this step's update is made.

    An update that is left out leaves weights and moments as they are: it is what Megatron-Core does after an overflow in fp16,
    which is not asked about. The norm is computed once: the optimizer's own call gets the same one.

    Args:
        optimizer: Megatron-Core's, chained or not.
        permit: gets the norm, the same on all ranks; returns the same on all ranks.
    """
    prepare, norm_of = optimizer.prepare_grads, optimizer.get_grad_norm
    known: list[Any] = []

    def prepare_grads() -> bool:
        if prepare():
            return True
        known[:] = [norm_of()]
        return not permit(float(known[0]))

    def get_grad_norm() -> Any:
        return known.pop() if known else norm_of()

    optimizer.prepare_grads, optimizer.get_grad_norm = prepare_grads, get_grad_norm


def keep_torch_steps_apart(optimizer: Any) -> int:
    """Let distributed optimizers over torch's AdamW be saved and loaded; the others, and a second call, change nothing.

    Returns:
        how many were changed.
    """
    changed = 0
    for each in getattr(optimizer, "chained_optimizers", [optimizer]):
        is_torch = type(getattr(each, "optimizer", None)).__module__.startswith("torch.optim")
        if isinstance(each, DistributedOptimizer) and is_torch and "load_state_dict" not in vars(each):
            _keep_steps_apart(each)
            changed += 1
    return changed


def _keep_steps_apart(optimizer: Any) -> None:
    get, put = optimizer._get_main_param_and_optimizer_states, optimizer._set_main_param_and_optimizer_states
    load, shard = optimizer.load_state_dict, optimizer.sharded_state_dict

    def get_without_step(model_param: Any) -> dict[str, Any]:
        return {name: tensor for name, tensor in get(model_param).items() if name != "step"}

    def put_without_step(model_param: Any, tensors: dict[str, Any]) -> None:
        group, place = optimizer.model_param_group_index_map[model_param]
        state = optimizer.optimizer.state[optimizer.optimizer.param_groups[group]["params"][place]]
        put(model_param, tensors | ({"step": state["step"]} if "step" in state else {}))

    def load_with_own_steps(state_dict: Any) -> None:
        with torch.no_grad():  # fp32 weights are read into views of the model's own
            load(state_dict)
        for state in optimizer.optimizer.state.values():
            if "step" in state:  # else one tensor would be counted up once a parameter
                state["step"] = state["step"].clone()

    def shard_with_states(model_sharded_state_dict: Any, is_loading: bool = False, **kwargs: Any) -> Any:
        if is_loading:  # what is read needs a place; apex and Transformer Engine have it from the start
            for group in optimizer.optimizer.param_groups:
                for param in group["params"]:
                    if param not in optimizer.optimizer.state:
                        zeros = {name: torch.zeros_like(param) for name in ("exp_avg", "exp_avg_sq")}
                        optimizer.optimizer.state[param] = {"step": torch.tensor(0.0), **zeros}
        return shard(model_sharded_state_dict, is_loading, **kwargs)

    optimizer._get_main_param_and_optimizer_states = get_without_step
    optimizer._set_main_param_and_optimizer_states = put_without_step
    optimizer.load_state_dict = load_with_own_steps
    optimizer.sharded_state_dict = shard_with_states

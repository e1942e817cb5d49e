"""NeMo's own LoRA with or without Transformer Engine, beside a RoPE variant that needs a transform, and merged into weights.

Without Transformer Engine stock `llm.peft.LoRA.transform` (NeMo 2.7.3) fails on two questions about types: whether a layer is
Transformer Engine's `Linear` (`UnavailableError`), and, in `get_adapter_attributes_from_linear`, whether it is of a class for
which Megatron-Core then has None (`TypeError`). Nothing behind them needs the package: adapters are Megatron-Core's own linear
layers. So the subclass below puts NeMo's parts together itself for the layers that Megatron-Core has on every machine.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import fiddle as fdl
import torch
from megatron.core import dist_checkpointing
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from nemo.collections import llm
from nemo.collections.llm import fn
from nemo.collections.llm.peft.lora import LoRALinear, LoRAMerge
from nemo.collections.llm.peft.utils import ParallelLinearAdapter, is_expert_linear
from nemo.lightning.ckpt_utils import ADAPTER_META_FILENAME

from nemo_longctx.adapters.nemo.model.rope import RopeTransform
from nemo_longctx.config import ConfigError
from nemo_longctx.rope.variants import RopeVariant, parse


@dataclasses.dataclass
class LongContextLoRA(llm.peft.LoRA):
    """`llm.peft.LoRA` for every linear layer that Megatron-Core has, which first places the base model's RoPE variant.

    A NeMo model has room for one transform: this one does both jobs.

    Args:
        rope: the variant as a mapping, where the base model has it from a `RopeTransform`; None where its config says it.
    """

    rope: dict[str, Any] | None = None

    def __post_init__(self):
        # What checkpoints write as the transform: NeMo's own class where that says it all, so that they load without this
        # package. NeMo would capture it by itself, but for a subclass only until the first instance of its parent.
        named = llm.peft.LoRA if self.rope is None else LongContextLoRA
        self.__io__ = fdl.Config(named, **_set_fields(self, named))

    @property
    def variant(self) -> RopeVariant | None:
        """The RoPE variant that this transform places, as `RopeTransform.variant`."""
        return None if self.rope is None else parse(self.rope)

    def place_rope(self, model: torch.nn.Module) -> None:
        """Place the variant, if any, on built models; no adapters yet. A second call changes nothing."""
        if self.rope is not None:
            RopeTransform(self.rope)(model)

    def __call__(self, model: torch.nn.Module) -> torch.nn.Module:
        """Place the variant, freeze the weights, and add adapters."""
        self.place_rope(model)
        return super().__call__(model)

    def transform(self, m: torch.nn.Module, name: str | None = None, prefix: str | None = None) -> torch.nn.Module:
        """The layer with its adapter, where its name is asked for; else the layer itself."""
        found = self.match(m, name, prefix)
        if found is None:
            return m
        if not isinstance(m, (ColumnParallelLinear, RowParallelLinear)):
            return super().transform(m, name, prefix)
        adapter = ParallelLinearAdapter(
            m.input_size,
            m.output_size,
            self.dim,
            base_linear_name=found[1],
            activation="identity",
            column_init_method=self.lora_A_init_method,
            row_init_method=self.lora_B_init_method,
            input_is_parallel=isinstance(m, RowParallelLinear),
            dropout=self.dropout,
            dropout_position=self.dropout_position,
            model_parallel_config=m.config,
            alpha=self.alpha,
            is_expert=is_expert_linear(found[1]),
            a2a_experimental=self.a2a_experimental,
            disable_sequence_parallel_comm=not m.config.sequence_parallel,
            dropout_recompute=self.dropout_recompute,
        )
        return LoRALinear(m, adapter)


def as_long_context(lora: llm.peft.LoRA) -> LongContextLoRA:
    """What a checkpoint's context names, as the class that works on this machine."""
    return lora if isinstance(lora, LongContextLoRA) else LongContextLoRA(**_set_fields(lora, llm.peft.LoRA))


def _set_fields(lora: llm.peft.LoRA, named: type) -> dict[str, Any]:
    """The fields of the dataclass `named` that are not at their defaults."""
    values = {}
    for field in dataclasses.fields(named):
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        if field.init and getattr(lora, field.name) != default:
            values[field.name] = getattr(lora, field.name)
    return values


def adapter_base(directory: Path) -> Path | None:
    """The folder of weights that a checkpoint's adapters belong to; None for a checkpoint that holds all weights itself.

    Args:
        directory: a NeMo checkpoint, with `weights/`.

    Raises:
        ConfigError: they are no longer where they were when the adapters were trained.
    """
    note = directory / "weights" / ADAPTER_META_FILENAME
    if not note.is_file():
        return None
    base = Path(json.loads(note.read_text("utf-8"))["model_ckpt_path"])
    if not base.is_dir():
        mend = f"the weights that these adapters were trained on are not there; put them back, or correct {note}"
        raise ConfigError("model_ckpt_path", str(base), mend)
    return base / "weights" if (base / "weights").is_dir() else base


def load_adapters(module: Any, lora: LongContextLoRA, directory: Path) -> None:
    """Add adapters to a built Megatron-Core model that has its base weights, and fill them from a checkpoint, in place."""
    fn.walk(module, lora.transform)
    sharded = {key: value for key, value in module.sharded_state_dict(prefix="module.").items() if ".adapter." in key}
    loaded = dist_checkpointing.load({"state_dict": sharded}, str(directory / "weights"))["state_dict"]
    module.load_state_dict({key.removeprefix("module."): value for key, value in loaded.items()}, strict=False)


def merge_adapters(module: torch.nn.Module) -> torch.nn.Module:
    """Add each adapter to the weight that it belongs to and take it away, in place. Only without tensor parallelism."""
    fn.walk(module, LoRAMerge().transform)
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LoRALinear):
                setattr(parent, name, child.to_wrap)
    return module

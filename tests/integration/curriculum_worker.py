"""One run of the real NeMo trainer on the CPU; writes what each rank's model saw. Started by test_data_module_training.py.

curriculum_worker.py SETTINGS.json
"""

import hashlib
import json
import os
import sys
from pathlib import Path

import torch

from nemo_longctx.adapters.megatron import cpu

cpu.install()

import lightning.pytorch as pl  # noqa: E402
import nemo.lightning as nl  # noqa: E402
from megatron.core.optimizer import OptimizerConfig  # noqa: E402
from megatron.core.transformer.transformer_layer import TransformerLayer  # noqa: E402
from nemo.lightning.pytorch.optim import CosineAnnealingScheduler, MegatronOptimizerModule  # noqa: E402

from nemo_longctx.adapters.nemo.data.data_module import LongContextDataModule  # noqa: E402
from nemo_longctx.adapters.nemo.model.config import fresh_model, prepare_model  # noqa: E402


class Witness(pl.Callback):
    """Writes every micro batch: step, shapes, and a hash of each window's tokens."""

    def __init__(self, path: Path, settings: dict):
        self.path, self.settings = path, settings

    def on_train_start(self, trainer, pl_module):
        self.layer_runs = 0  # forwards of layers, those for the backward pass included
        for module in pl_module.modules():
            if isinstance(module, TransformerLayer):
                module.register_forward_hook(self.count)

    def count(self, *_):
        self.layer_runs += 1

    def on_megatron_microbatches_start(self, step):
        self.shapes = {name: getattr(step, name) for name in ("seq_length", "micro_batch_size", "num_microbatches")}

    def on_megatron_microbatch_start(self, step, batch, forward_callback):
        mode = "train" if step.trainer.training else "sanity" if step.trainer.sanity_checking else "validation"
        windows = () if batch["tokens"] is None else batch["tokens"]  # only the first pipeline stage has tokens
        row = {
            "mode": mode,
            "step": step.step_i,
            **self.shapes,
            "packed": batch.get("packed_seq_params") is not None,
            "windows": [hashlib.sha256(window.numpy().tobytes()).hexdigest() for window in windows],
        }
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        with self.path.open("a") as file:
            row = {"mode": "metrics", "step": trainer.global_step, "layer_runs": self.layer_runs, **metrics}
            file.write(json.dumps(row) + "\n")
        self.layer_runs = 0
        if trainer.global_step == self.settings.get("save_after"):
            trainer.save_checkpoint(self.settings["checkpoint"])
        if trainer.global_step == self.settings.get("die_after"):
            os._exit(9)  # a kill: no end of training, no checkpoint

    def on_validation_end(self, trainer, pl_module):
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if "val_loss" in name}
        with self.path.open("a") as file:
            file.write(json.dumps({"mode": "validated", "step": trainer.global_step, **metrics}) + "\n")


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    torch.set_num_threads(1)
    pl.seed_everything(1)
    data = LongContextDataModule(**settings["data"])
    model = fresh_model(
        {"config": "LlamaConfig", "num_layers": settings.get("num_layers", 1), "hidden_size": 32, "ffn_hidden_size": 64,
         "num_attention_heads": 2, "num_query_groups": 2, "seq_length": data.seq_length, "make_vocab_size_divisible_by": 1,
         "vocab_size": 128}
    )  # fmt: skip
    prepare_model(model, seq_length=data.seq_length)
    optimizer = OptimizerConfig(
        optimizer="adam", lr=1e-3, bf16=False, fp16=False, use_distributed_optimizer=False, clip_grad=0.0
    )
    schedule = CosineAnnealingScheduler(max_steps=8, warmup_steps=1, constant_steps=0, min_lr=0.0)
    MegatronOptimizerModule(optimizer, lr_scheduler=schedule).connect(model)
    trainer = nl.Trainer(
        accelerator="cpu",
        devices=world,
        max_steps=settings.get("max_steps", -1),
        strategy=nl.MegatronStrategy(
            ckpt_load_optimizer=True,
            ckpt_save_optimizer=True,
            ckpt_async_save=False,
            ckpt_parallel_load=False,
            pipeline_dtype=torch.float32,
            **settings.get("strategy", {}),
        ),
        plugins=nl.MegatronMixedPrecision(precision="32"),
        limit_val_batches=settings.get("limit_val_batches", 0),
        val_check_interval=settings.get("val_check_interval", 1.0),
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_checkpointing=False,
        logger=False,
        log_every_n_steps=1,
        callbacks=[Witness(Path(settings["witness"]).with_suffix(f".{rank}.jsonl"), settings)],
    )
    trainer.fit(model, data, ckpt_path=settings.get("resume"))


if __name__ == "__main__":
    main()

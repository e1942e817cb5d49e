"""Both sides of each bound of the settings: the last value that is taken, and the first that is refused, with its sentence."""

import pytest

from nemo_longctx.config import ConfigError
from nemo_longctx.data.curation.config import CurateConfig
from nemo_longctx.data.prepare_config import PrepareConfig
from nemo_longctx.data.retrieval_text import RetrievalConfig
from nemo_longctx.eval.config import AnswersTask, ContextTask, EvalConfig, HarnessTask, PositionTask
from nemo_longctx.eval.guard import GuardConfig
from nemo_longctx.eval.probes import ProbeConfig
from nemo_longctx.eval.requests import Generation
from nemo_longctx.eval.scoring import Chunks
from nemo_longctx.instruct.client import ClientConfig
from nemo_longctx.instruct.pipeline import GenerateConfig
from nemo_longctx.recipe import BadNumbersConfig, CheckpointConfig, LoRAConfig, OptimizerConfig, TrainerConfig
from nemo_longctx.rope import LongRope

NEEDED = {
    CurateConfig: {"inputs": ("a",), "output": "a.jsonl"},
    PrepareConfig: {"inputs": ("a",), "output": "a", "tokenizer": "t"},
    RetrievalConfig: {"length": 1024, "tokens": 10_240},
    HarnessTask: {"tasks": ("a",)},
    PositionTask: {"corpus": "c", "seq_length": 8},
    ContextTask: {"corpus": "c", "contexts": (4, 8)},
    AnswersTask: {"conversations": "c"},
    Generation: {"context": (1,), "max_new_tokens": 1, "stop": bool},
    ClientConfig: {"endpoint": "http://host/v1"},
    GenerateConfig: {"model": "m", "documents": ("a",), "tokenizer": "t"},
    LongRope: {"short_factor": (1.0,), "long_factor": (2.0,), "factor": 4.0, "original_max_position_embeddings": 4096},
}
TENTH, ABOVE = 0.1, 1.0000001


# A class, settings of it that are taken, settings that are refused, and what is said.
BOUNDS = [
    (OptimizerConfig, {"beta1": 0.0}, {"beta1": -TENTH}, "set a decay rate in [0, 1)"),
    (OptimizerConfig, {"beta2": 0.999}, {"beta2": 1.0}, "set a decay rate in [0, 1)"),
    (OptimizerConfig, {"lr": 0.99}, {"lr": 1.0}, "set a peak learning rate between 0 and 1"),
    (OptimizerConfig, {"epsilon": 0.99}, {"epsilon": 1.0}, "set a number far below 1"),
    (CheckpointConfig, {"every_tokens": 0}, {"every_tokens": -1}, "set 0 (only at the end) or more"),
    (CheckpointConfig, {"keep": 0}, {"keep": -1}, "set 0 or more"),
    (CheckpointConfig, {"keep_last": 1}, {"keep_last": 0}, "set 1 or more"),
    (BadNumbersConfig, {"spike_window": 2}, {"spike_window": 1}, "set 2 steps or more"),
    (BadNumbersConfig, {"spike_factor": ABOVE}, {"spike_factor": 1.0}, "set a number above 1"),
    (LoRAConfig, {"dropout": 0.0}, {"dropout": -TENTH}, "must be in [0, 1)"),
    (LoRAConfig, {"dropout": 0.99}, {"dropout": 1.0}, "must be in [0, 1)"),
    (TrainerConfig, {"val_every_tokens": 0}, {"val_every_tokens": -1}, "set 0 (only at the end) or more"),
    (TrainerConfig, {"accelerator": "cpu"}, {"accelerator": "tpu"}, "set cpu or gpu"),
    (
        TrainerConfig,
        {"sequence_parallel": True, "tensor_model_parallel_size": 2, "devices": 2},
        {"sequence_parallel": True},
        "needs trainer.tensor_model_parallel_size above 1",
    ),
    (CurateConfig, {"workers": 1, "shard_bytes": 1}, {"workers": 0}, "use 1 or more"),
    (CurateConfig, {"min_length": 1}, {"min_length": 0}, "use 1 or more"),
    (CurateConfig, {"min_length": 5, "max_length": 5}, {"min_length": 5, "max_length": 4}, "below min_length=5"),
    (CurateConfig, {"split_lengths": (1, 2)}, {"split_lengths": (0, 2)}, "edges of buckets in rising order"),
    (CurateConfig, {"split_lengths": (8,)}, {"split_lengths": (8, 8)}, "edges of buckets in rising order"),
    (CurateConfig, {"split_lengths": (8, 9)}, {"split_lengths": (9, 8)}, "edges of buckets in rising order"),
    (CurateConfig, {"max_repeated_lines": 1.0}, {"max_repeated_lines": ABOVE}, "a share from 0 to 1"),
    (CurateConfig, {"max_boilerplate": 0.0}, {"max_boilerplate": -TENTH}, "a share from 0 to 1"),
    (CurateConfig, {"gzip_band": (0.0, 1.0)}, {"gzip_band": (-TENTH, 1.0)}, "two quantiles in rising order"),
    (CurateConfig, {"gzip_band": (0.2, 0.8)}, {"gzip_band": (0.8, 0.8)}, "two quantiles in rising order"),
    (CurateConfig, {}, {"gzip_band": (0.2, ABOVE)}, "two quantiles in rising order"),
    (CurateConfig, {}, {"gzip_band": (0.2, 0.5, 0.8)}, "two quantiles in rising order"),
    (CurateConfig, {"parent": "p", "assemble": "threads"}, {"parent": "p", "assemble": "chapters"}, "only threads have"),
    (PrepareConfig, {"workers": 1, "max_file_bytes": 1}, {"max_file_bytes": 0}, "use 1 or more"),
    (PrepareConfig, {"holdout": 0.0}, {"holdout": -TENTH}, "a share of the documents, from 0 to below 1"),
    (PrepareConfig, {"holdout": 0.99}, {"holdout": 1.0}, "a share of the documents, from 0 to below 1"),
    (PrepareConfig, {"seed": 2**63 - 1}, {"seed": 2**63}, "use a number from 0 to 2**63 - 1"),
    (PrepareConfig, {"seed": 0}, {"seed": -1}, "use a number from 0 to 2**63 - 1"),
    (PrepareConfig, {"eod_token": "</s>"}, {"eod_token": "</s>", "append_eod": False}, "it is not appended with"),
    (PrepareConfig, {"output": "a.bins"}, {"output": "a.bin"}, "is a prefix, to which .bin and .idx are added; name it 'a'"),
    (RetrievalConfig, {"length": 64}, {"length": 63}, "give at least 64 tokens a document"),
    (RetrievalConfig, {"tokens": 1024}, {"tokens": 1023}, "give at least the 1024 tokens of one document"),
    (RetrievalConfig, {"facts": 1}, {"facts": 0}, "give at least 1"),
    (RetrievalConfig, {"filler": 0.0}, {"filler": -TENTH}, "give a share from 0 to below 1"),
    (RetrievalConfig, {"filler": 0.99}, {"filler": 1.0}, "give a share from 0 to below 1"),
    (RetrievalConfig, {"shares": {"passkey": 1.0}}, {"shares": {"passkey": 0.9}}, "shares add up to 1, these to 0.9"),
    (RetrievalConfig, {}, {"shares": {"passkey": 1.0, "records": 0.0}}, "give a share above 0"),
    (HarnessTask, {"limit": 1}, {"limit": 0}, "give 1 or more samples, or none of it for all"),
    (HarnessTask, {"num_fewshot": 0}, {"num_fewshot": -1}, "give 0 or more shots"),
    (HarnessTask, {"max_prompt": 1}, {"max_prompt": 0}, "give at least 1 token, or leave it out"),
    (HarnessTask, {"metadata": {"a": 1}}, {"metadata": ["a"]}, "give keys and values"),
    (PositionTask, {"seq_length": 1, "documents": 1}, {"seq_length": 0}, "give a positive number"),
    (PositionTask, {"bins": 0}, {"bins": -1}, "give up to 1,000,000 bins, or 0"),
    (PositionTask, {"bins": 1_000_000}, {"bins": 1_000_001}, "give up to 1,000,000 bins, or 0"),
    (ContextTask, {"targets": 1, "blocks": 1}, {"blocks": 0}, "give a positive number"),
    (ContextTask, {"contexts": (1, 2)}, {"contexts": (0, 2)}, "give at least two rising numbers"),
    (ContextTask, {"contexts": (4, 8), "short": 4}, {"contexts": (4, 8), "short": 8}, "below the longest: [4]"),
    (ContextTask, {"key_threshold": 0.001}, {"key_threshold": 0.0}, "give a fall of the loss above 0"),
    (AnswersTask, {"samples": 1}, {"samples": 0}, "give a positive number"),
    (EvalConfig, {"every": 0}, {"every": -1}, "give a number of steps, or 0"),
    (EvalConfig, {"time_budget": 0.5}, {"time_budget": 0}, "give seconds, or leave it out"),
    (EvalConfig, {"max_length": 2}, {"max_length": 1}, "give at least 2 tokens, or leave it out"),
    (GuardConfig, {"loss": 0.0, "score": 0.0}, {"score": -TENTH}, "give a change of 0 or more"),
    (GuardConfig, {"significance": 0.99}, {"significance": 1.0}, "chance of a false alarm, between 0 and 1"),
    (GuardConfig, {"action": "stop"}, {"significance": 0.0}, "chance of a false alarm, between 0 and 1"),
    (ProbeConfig, {"lengths": (1,), "samples": 1}, {"lengths": (8, 0)}, "give at least one positive length"),
    (ProbeConfig, {"depths": (0.0, 1.0)}, {"depths": (-TENTH,)}, "give shares between 0 (start) and 1 (end)"),
    (ProbeConfig, {"depths": (0.5,)}, {"depths": ()}, "give shares between 0 (start) and 1 (end)"),
    (ProbeConfig, {"max_new_tokens": 1}, {"max_new_tokens": 0}, "give at least 1 token for the answer"),
    (ProbeConfig, {"kinds": ("code",)}, {"kinds": ()}, "name at least one of first_sentence, passkey"),
    (Generation, {"top_p": 1.0}, {"top_p": ABOVE}, "give a share above 0 and at most 1"),
    (Generation, {"temperature": 0.0, "top_k": 0}, {"top_k": -1}, "give 0 for no limit"),
    (Chunks, {"read": 1, "logits": 1}, {"logits": 0}, "give a positive number of bytes"),
    (ClientConfig, {"concurrency": 1}, {"concurrency": 0}, "must be at least 1"),
    (ClientConfig, {"requests_per_minute": 0}, {"requests_per_minute": -TENTH}, "0 means no limit"),
    (ClientConfig, {"timeout_s": 0.1}, {"timeout_s": 0}, "more than 0"),
    (ClientConfig, {}, {"timeout_s": float("inf")}, "more than 0"),
    (ClientConfig, {"max_retries": 0}, {"max_retries": -1}, "must not be negative"),
    (ClientConfig, {"endpoint": "https://host"}, {"endpoint": "ftp://host"}, "is no http(s) address"),
    (ClientConfig, {}, {"endpoint": "http:///v1"}, "is no http(s) address"),
    (ClientConfig, {}, {"endpoint": "http://host/v1?key=a"}, "holds a key; keys only come from the environment"),
    (ClientConfig, {}, {"endpoint": "http://me@host/v1"}, "holds a key; keys only come from the environment"),
    (ClientConfig, {}, {"endpoint": "http://:secret@host/v1"}, "holds a key; keys only come from the environment"),
    (GenerateConfig, {"target_length": 33, "chunk_tokens": 32}, {"target_length": 32, "chunk_tokens": 32}, "leaves no room"),
    (GenerateConfig, {"form_attempts": 1, "stop_after_malformed": 1}, {"form_attempts": 0}, "must be at least 1"),
    (GenerateConfig, {"max_chunks_per_document": 0}, {"max_chunks_per_document": -1}, "must not be negative"),
    (GenerateConfig, {"template_tokens": 0}, {"template_tokens": -1}, "must not be negative"),
    (GenerateConfig, {"near_duplicate": 1.0}, {"near_duplicate": ABOVE}, "must be in (0, 1]"),
    (GenerateConfig, {"near_duplicate": 0.01}, {"near_duplicate": 0.0}, "must be in (0, 1]"),
    (GenerateConfig, {"chunk_tokens": 32}, {"chunk_tokens": 31}, "must be at least 32"),
    (GenerateConfig, {"temperature": 0.0}, {"temperature": -TENTH}, "must be a number that is not negative"),
    (GenerateConfig, {}, {"temperature": float("inf")}, "must be a number that is not negative"),
    (GenerateConfig, {}, {"model": ""}, "name the model as the server knows it"),
    (LongRope, {"original_max_position_embeddings": 2}, {"original_max_position_embeddings": 1}, "must be 2 or more"),
    (LongRope, {}, {"short_factor": ()}, "must be a list of numbers, one a pair of dimensions"),
    (LongRope, {}, {"long_factor": "2"}, "must be a list of numbers, one a pair of dimensions"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("made", "taken", "refused", "said"), BOUNDS, ids=[f"{made.__name__}-{no}" for made, _, no, _ in BOUNDS]
)
def test_a_setting_is_taken_to_its_bound_and_refused_beyond(made, taken, refused, said):
    needed = NEEDED.get(made, {})
    found = made(**{**needed, **taken})
    for key, value in taken.items():
        assert getattr(found, key) == value
    with pytest.raises(ConfigError) as error:
        made(**{**needed, **refused})
    assert said in str(error.value)
    assert error.value.key.split(".")[-1].split("[")[0] in {*refused, *taken, "kinds", "passkey", "records"}

"""The rows of Table 9 as configs: each is one line, and the line says what the row says."""

from pathlib import Path

import pytest

from nemo_longctx.compose import CONF_DIR, compose
from nemo_longctx.config import build
from nemo_longctx.data.curriculum import Curriculum
from nemo_longctx.data.sft import InstructionConfig

# Xiong et al. 2023, Table 9: which data, and whether long prompts count.
ROWS = {
    "chat_baseline": ({"short"}, 4096, 1.0),
    "short": ({"short"}, 16_384, 1.0),
    "short_and_pretraining": ({"short", "pretraining"}, 16_384, 1.0),
    "self_instruct_no_prompt_loss": ({"short", "long"}, 16_384, 0.0),
    "self_instruct_prompt_loss": ({"short", "long"}, 16_384, 1.0),
}


def test_every_row_is_a_file_of_one_line():
    files = sorted(Path(CONF_DIR, "sft").glob("*.yaml"))
    assert {file.stem for file in files} == set(ROWS)
    for file in files:
        lines = [line for line in file.read_text().splitlines() if line and not line.startswith("#")]
        assert len(lines) == 1, file


@pytest.mark.parametrize("row", sorted(ROWS))
def test_the_row_builds_and_says_what_it_should(row):
    sources, seq_length, prompt_loss_weight = ROWS[row]
    values = compose([f"sft={row}"], config_name="sft")
    curriculum = build(Curriculum, values["curriculum"])
    keys = {"blend", "prompt_loss_weight", "on_too_long"} & values["data"].keys()
    length = curriculum.plan[0].seq_length
    config = build(InstructionConfig, {key: values["data"][key] for key in keys} | {"seq_length": length})
    assert set(config.blend) == sources
    assert (length, config.prompt_loss_weight) == (seq_length, prompt_loss_weight)


def test_an_override_wins_over_the_row():
    values = compose(["sft=short", "data.blend={long: 1.0}", "data.prompt_loss_weight=0.1"], config_name="sft")
    assert values["data"]["prompt_loss_weight"] == 0.1
    assert values["data"]["blend"]["long"] == 1.0

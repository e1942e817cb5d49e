"""The journal keeps what was paid for, through torn lines and second writers."""

import pytest

from nemo_longctx.config import ConfigError
from nemo_longctx.instruct.journal import Journal, Reply


def reply(text: str) -> Reply:
    return Reply(text=text, finish_reason="stop", prompt_tokens=3, completion_tokens=2)


def test_replies_come_back(tmp_path):
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        journal.append("a", reply("line\nbreak \u2028 é 🚢"))
        journal.append("b", reply("two"))
    with Journal(path) as journal:
        assert len(journal) == 2
        assert journal.get("a") == reply("line\nbreak \u2028 é 🚢")
        assert journal.get("c") is None


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_torn_last_line_is_forgotten_and_the_next_is_whole(tmp_path, cut):
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        journal.append("a", reply("one"))
        journal.append("b", reply("two"))
    path.write_bytes(path.read_bytes()[:-cut])
    with Journal(path) as journal:
        assert journal.get("a") == reply("one")
        assert journal.get("b") is None
        journal.append("b", reply("again"))
    with Journal(path) as journal:
        assert journal.get("b") == reply("again")


def test_damage_in_the_middle_is_named(tmp_path):
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        journal.append("a", reply("one"))
    path.write_bytes(b"\0\0\0\n" + path.read_bytes())
    with pytest.raises(ConfigError, match=r"journal\.jsonl:1"):
        Journal(path)


@pytest.mark.parametrize(
    "line",
    [
        '{"key": "a", "text": ["x"], "finish_reason": "stop", "prompt_tokens": 1, "completion_tokens": 1}',
        '{"key": "a", "text": "x", "finish_reason": "stop", "prompt_tokens": "1", "completion_tokens": 1}',
        '["a"]',
        '"a"',
    ],
)
def test_a_row_of_another_type_is_named(tmp_path, line):
    (tmp_path / "journal.jsonl").write_text(line + "\n")
    with pytest.raises(ConfigError, match=r"journal\.jsonl:1"):
        Journal(tmp_path / "journal.jsonl")


def test_replies_that_an_earlier_version_kept_without_counts_are_not_paid_again(tmp_path):
    line = '{"key": "a", "text": "one", "finish_reason": "stop", "prompt_tokens": null, "completion_tokens": 2}\n'
    (tmp_path / "journal.jsonl").write_text(line)
    with Journal(tmp_path / "journal.jsonl") as journal:
        assert journal.get("a") == Reply(text="one", finish_reason="stop", prompt_tokens=0, completion_tokens=2)


def test_two_runs_cannot_share_a_journal(tmp_path):
    with Journal(tmp_path / "journal.jsonl"), pytest.raises(ConfigError, match="another run"):
        Journal(tmp_path / "journal.jsonl")

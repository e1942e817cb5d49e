"""Generation end to end: the command against a real server, whole, with faults, and killed again and again."""

import contextlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from faulty_server import Behaviour, serve
from stories import jsonl, story
from tokenizers import Tokenizer

from nemo_longctx.cli import main
from nemo_longctx.instruct import client as client_module
from nemo_longctx.instruct.prompts import PromptSet

# The command as the entry point runs it, with waits between retries that suit a test.
RUN = """
import sys
from nemo_longctx.instruct import client
client._BACKOFF_FIRST_S = 0.01
from nemo_longctx.cli import main
sys.exit(main(sys.argv[1:]))
"""


class Command:
    """`nemo-longctx instruct generate` with small settings."""

    def __init__(self, documents: Path, tokenizer: Path, output: Path, url: str, **settings):
        settings = {"target_length": 600, "chunk_tokens": 120, "timeout_s": 60, "max_retries": 8} | settings
        flags = [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", str(value))]
        self.output = output
        self.line = [sys.executable, "-c", RUN, "instruct", "generate", str(documents), "--output", str(output)]
        self.line += ["--endpoint", url, "--model", "small", "--tokenizer", str(tokenizer), *flags]

    def start(self, **environment: str) -> subprocess.Popen:
        env = {key: value for key, value in os.environ.items() if key != "OPENAI_API_KEY"} | environment
        return subprocess.Popen(self.line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)

    def run(self) -> tuple[int, str, str]:
        """Run in this process: (status, stdout, stderr)."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(self.line[3:])
        return status, out.getvalue(), err.getvalue()

    def instances(self) -> list[dict]:
        return [json.loads(line) for line in (self.output / "instances.jsonl").read_text().split("\n")[:-1]]

    def dropped(self) -> list[dict]:
        return [json.loads(line) for line in (self.output / "dropped.jsonl").read_text().split("\n")[:-1]]

    def written(self) -> list[bytes]:
        """The files that faults and kills must not change."""
        return [(self.output / name).read_bytes() for name in ("instances.jsonl", "dropped.jsonl")]

    def report(self) -> dict:
        return json.loads((self.output / "report.json").read_text())

    def journal_keys(self) -> list[str]:
        path = self.output / "journal.jsonl"
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        return [json.loads(line)["key"] for line in lines]


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(client_module, "_BACKOFF_FIRST_S", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    draw = random.Random(5)
    return [story(seed, draw.choice([4, 8, 16, 60])) for seed in range(12)] + ["", "  \n"]


@pytest.fixture(scope="module")
def whole_run(tokenizer_folder, tmp_path_factory, texts):
    """(command, documents) of a run without faults."""
    folder = tmp_path_factory.mktemp("whole")
    documents = jsonl(folder / "documents.jsonl", [*texts, texts[0]])
    with serve(Behaviour()) as url:
        command = Command(documents, tokenizer_folder, folder / "out", url)
        status, _, err = command.run()
    assert status == 0, err
    return command, documents


def test_rows_hold_what_the_issue_promises(whole_run, texts, tokenizer_folder):
    command, _ = whole_run
    rows, counts = command.instances(), command.report()["yield"]
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    by_id = {f"doc{i}": text for i, text in enumerate(texts)}
    assert len({row["id"] for row in rows}) == len(rows) == counts["kept"]
    cut = 0
    for row in rows:
        made, (user, assistant) = row["provenance"], row["messages"]
        text = by_id[made["document_id"]]
        start, end = made["chunk_characters"]
        kept = text[: made["document_characters"][1]]
        assert user["content"] == PromptSet.load().fill(f"train_{made['kind']}", document=kept, question=made["question"])
        assert end <= len(kept)
        assert made["question"].split()[2] in text[start:end]
        assert made["prompt_version"] == PromptSet.load().version
        tokens = sum(len(tokenizer.encode(message["content"], add_special_tokens=False).ids) for message in (user, assistant))
        assert tokens == row["tokens"] <= 600 - 64
        if len(kept) < len(text):
            cut += 1
            assert row["tokens"] > 600 - 64 - 4  # cut no more than it must
    assert cut
    assert Counter(row["provenance"]["kind"] for row in rows).keys() == {"normal", "short"}


def test_the_yield_adds_up(whole_run):
    counts = whole_run[0].report()["yield"]
    assert counts["documents"] == 15
    assert (counts["documents_empty"], counts["documents_repeated"]) == (2, 1)
    assert counts["chunks"] == counts["asked"] + counts["outside_cut_before_asking"]
    assert counts["asked"] == counts["parsed"]
    assert counts["parsed"] == sum(counts[name] for name in ("near_duplicate", "critiqued_away", "outside_cut", "kept"))
    assert counts["kept"] == counts["kept_normal"] + counts["kept_short"]
    assert min(counts[name] for name in ("near_duplicate", "critiqued_away", "outside_cut", "kept")) > 0


def test_what_was_dropped_is_kept_with_its_reason(whole_run):
    command, _ = whole_run
    counts, rows, dropped = command.report()["yield"], command.instances(), command.dropped()
    ids = [row["id"] for row in rows] + [row["id"] for row in dropped]
    assert len(ids) == len(set(ids)) == counts["asked"]
    reasons = Counter(row["reason"] for row in dropped)
    assert reasons == {name: counts[name] for name in ("near_duplicate", "critiqued_away", "outside_cut")}
    for row in dropped:
        assert row["question"]
        assert row["answer"]
        assert row["reason"] != "critiqued_away" or row["critique"] == "It is not there."
        assert row["reason"] != "near_duplicate" or row["of"] in ids
        assert row["reason"] != "outside_cut" or row["document_ends"] < row["chunk_characters"][1]


def test_questions_never_in_form_are_dropped_with_the_last_fault(tokenizer_folder, tmp_path):
    documents = jsonl(tmp_path / "documents.jsonl", [story(1, 4), story(2, 4)])
    with serve(Behaviour(always="<question>What?</question>")) as url:
        command = Command(documents, tokenizer_folder, tmp_path / "out", url, stop_after_malformed=1000)
        assert command.run()[0] == 0
    asked = command.report()["yield"]["asked"]
    assert [(row["reason"], row["said"]) for row in command.dropped()] == [("question_malformed", "missing_answer")] * asked
    assert command.report()["calls"]["out_of_form"] == {"missing_answer": 3 * asked}


def test_faults_do_not_change_the_output(whole_run, tokenizer_folder, tmp_path):
    whole, documents = whole_run
    behaviour = Behaviour(fault_rate=0.3, malformed_rate=0.15, hang_s=0.05)
    with serve(behaviour) as url:
        command = Command(documents, tokenizer_folder, tmp_path / "faulty", url, form_attempts=8)
        status, _, err = command.run()
    assert status == 0, err
    assert command.written() == whole.written()
    assert command.report()["yield"] == whole.report()["yield"]
    calls = command.report()["calls"]
    assert len(calls["faults_retried"]) >= 4
    assert sum(calls["out_of_form"].values()) > 0
    assert calls["made"] == len(behaviour.answered) == len(set(command.journal_keys()))
    # A critique is asked at 0; where its reply was out of form the same words would bring the same, so it is warmed up.
    asked = defaultdict(set)
    for body in behaviour.bodies:
        if "<verdict>" in (prompt := body["messages"][0]["content"]):
            asked[prompt].add((body["seed"], body["temperature"]))
    attempts = [[temperature for _, temperature in sorted(each)] for each in asked.values()]
    assert all(temperatures == [0.0] + [0.7] * (len(temperatures) - 1) for temperatures in attempts)
    assert max(map(len, attempts)) > 1


def test_a_second_run_asks_nothing_and_writes_the_same(whole_run, tokenizer_folder, tmp_path):
    whole, documents = whole_run
    again = tmp_path / "again"
    again.mkdir()
    shutil.copy(whole.output / "journal.jsonl", again)
    behaviour = Behaviour(status=500)
    with serve(behaviour) as url:
        command = Command(documents, tokenizer_folder, again, url, max_retries=0, price_input=3, price_output=50)
        status, out, err = command.run()
    assert status == 0, err
    assert "kept" in out
    assert not behaviour.bodies
    assert command.written() == whole.written()
    calls, paid = command.report()["calls"], len(whole.journal_keys())  # what was paid for before counts, too
    assert (calls["made"], calls["replayed"]) == (0, paid)
    assert (calls["prompt_tokens"], calls["completion_tokens"]) == (100 * paid, 10 * paid)
    assert calls["cost"] == pytest.approx(paid * (3 * 100 + 50 * 10) / 1e6, rel=1e-6)


def kill_again_and_again(command: Command, behaviour: Behaviour, *, kills: int, share: float, concurrency: int) -> None:
    """Kill the run at `kills` random moments, then let it end; nothing journaled may ever be asked for again."""
    draw = random.Random(1)
    for _ in range(kills):
        before = len(command.journal_keys())
        target = before + max(1, int(draw.random() * share))
        process = command.start()
        while process.poll() is None and len(command.journal_keys()) < target:
            time.sleep(0.01)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.communicate()
        paid = command.journal_keys()
        with behaviour.lock:
            seen = {key: behaviour.arrivals[key] for key in paid}
    status, _, err = command.run()
    assert status == 0, err
    assert all(behaviour.arrivals[key] == count for key, count in seen.items())
    keys = command.journal_keys()
    assert len(keys) == len(set(keys)) == len(behaviour.answered)
    # All that can be charged again is what was under way at a kill (a server that minds the idempotency key charges none).
    again = sum(count - 1 for count in behaviour.answered.values())
    assert again <= kills * concurrency
    print(f"{kills} kills, {len(keys)} replies, {again} in flight at a kill and asked again")


def test_killed_runs_end_in_the_same_output(whole_run, tokenizer_folder, tmp_path):
    whole, documents = whole_run
    behaviour = Behaviour(fault_rate=0.1, malformed_rate=0.1, hang_s=0.05, delay_s=0.01)
    with serve(behaviour) as url:
        command = Command(documents, tokenizer_folder, tmp_path / "killed", url, form_attempts=8, concurrency=4)
        kill_again_and_again(command, behaviour, kills=3, share=60, concurrency=4)
    assert command.written() == whole.written()
    assert command.report()["yield"] == whole.report()["yield"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_waits_for_the_calls_under_way(tokenizer_folder, tmp_path, number):
    documents = jsonl(tmp_path / "documents.jsonl", [story(seed, 20) for seed in range(40)])
    behaviour = Behaviour(delay_s=0.3)
    with serve(behaviour) as url:
        command = Command(documents, tokenizer_folder, tmp_path / "out", url, concurrency=4, timeout_s=30)
        process = command.start()
        while not command.journal_keys():
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(number)
        _, err = process.communicate()
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert sum(behaviour.answered.values()) == len(command.journal_keys()) < 40  # nothing that was paid for is lost


@pytest.mark.slow
def test_a_thousand_documents_and_ten_kills(tokenizer_folder, tmp_path):
    draw = random.Random(7)
    documents = jsonl(tmp_path / "documents.jsonl", [story(seed, draw.choice([4, 6, 10, 20])) for seed in range(1000)])
    with serve(Behaviour()) as url:
        whole = Command(documents, tokenizer_folder, tmp_path / "whole", url, concurrency=16)
        assert whole.run()[0] == 0
    replies = len(whole.journal_keys())
    behaviour = Behaviour(fault_rate=0.1, malformed_rate=0.05, hang_s=0.05)
    with serve(behaviour) as url:
        command = Command(documents, tokenizer_folder, tmp_path / "killed", url, form_attempts=8, concurrency=16)
        kill_again_and_again(command, behaviour, kills=10, share=replies / 6, concurrency=16)
    assert command.written() == whole.written()
    assert command.report()["yield"] == whole.report()["yield"]
    rows = command.instances()
    assert len({row["id"] for row in rows}) == len({row["provenance"]["question"] for row in rows}) == len(rows) > 1000
    print(json.dumps(command.report(), indent=1))


def test_never_in_form_stops_early_with_a_count(tokenizer_folder, tmp_path):
    documents = jsonl(tmp_path / "documents.jsonl", [story(seed, 40) for seed in range(10)])
    behaviour = Behaviour(always="I am a teapot.")
    with serve(behaviour) as url:
        command = Command(documents, tokenizer_folder, tmp_path / "out", url, concurrency=4)
        status, _, err = command.run()
        assert status == 2
        assert "the last 20 calls gave nothing in form (20 no_tags)" in err
        assert len(behaviour.bodies) < 20 + 4
        assert len(command.journal_keys()) == len(behaviour.bodies)  # what was under way came home
        paid = len(behaviour.bodies)
        assert command.run()[0] == 2  # nor does a second run pay for more of the same
        assert len(behaviour.bodies) < paid + 4


def test_refused_requests_stop_early_with_the_servers_words(tokenizer_folder, tmp_path):
    documents = jsonl(tmp_path / "documents.jsonl", [story(seed, 40) for seed in range(10)])
    behaviour = Behaviour(status=400)
    with serve(behaviour) as url:
        status, _, err = Command(documents, tokenizer_folder, tmp_path / "out", url, concurrency=4).run()
    assert status == 2
    assert "maximum context length" in err
    assert len(behaviour.bodies) < 20 + 4  # what was under way when the twentieth came


def test_the_key_is_nowhere(tokenizer_folder, tmp_path):
    documents = jsonl(tmp_path / "documents.jsonl", [story(1, 6)])
    with serve(Behaviour(accept_key="sk-secret-123")) as url:
        command = Command(documents, tokenizer_folder, tmp_path / "out", url)
        process = command.start(OPENAI_API_KEY="sk-secret-123", NEMO_LONGCTX_DEBUG="1", OPENAI_LOG="debug")
        said = "".join(process.communicate())
        assert process.returncode == 0
        other = Command(documents, tokenizer_folder, tmp_path / "other", url)
        process = other.start(OPENAI_API_KEY="sk-wrong-456")
        said += "".join(process.communicate())
    assert process.returncode == 2
    assert "refused the key in OPENAI_API_KEY" in said
    written = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    for key in ("sk-secret", "sk-wrong"):
        assert key not in said
        assert key not in written


@pytest.mark.parametrize(("texts", "said"), [([], "0 read"), (["", " \n "], "2 read")])
def test_documents_without_text(tokenizer_folder, tmp_path, texts, said):
    documents = jsonl(tmp_path / "documents.jsonl", texts)
    status, _, err = Command(documents, tokenizer_folder, tmp_path / "out", "http://127.0.0.1:9/v1").run()
    assert status == 2
    assert said in err
    assert "Traceback" not in err


def test_an_endpoint_that_is_down_is_said_soon(tokenizer_folder, tmp_path):
    documents = jsonl(tmp_path / "documents.jsonl", [story(1, 6)])
    with serve(Behaviour()) as url:
        pass
    status, _, err = Command(documents, tokenizer_folder, tmp_path / "out", url).run()
    assert status == 2
    assert "does not answer" in err
    assert "Traceback" not in err


def test_a_document_that_is_edited_in_mid_run_is_no_other_documents_text(tokenizer_folder, tmp_path):
    documents = jsonl(tmp_path / "documents.jsonl", [story(seed, 12) for seed in range(60)])

    class Bodies(list):
        def append(self, body):
            super().append(body)
            if len(self) == 4:  # as long as before, so that every document begins where it did
                documents.write_bytes(documents.read_bytes().replace(b"the ", b"THE "))

    with serve(Behaviour(bodies=Bodies())) as url:
        command = Command(documents, tokenizer_folder, tmp_path / "out", url, concurrency=2)
        status, _, err = command.run()
    assert status == 2
    assert "changed while it was being read; run the command again" in err
    assert not (tmp_path / "out" / "instances.jsonl").exists()


def test_no_room_for_a_document(tokenizer_folder, tmp_path):
    documents = jsonl(tmp_path / "documents.jsonl", [story(1, 30)])
    with serve(Behaviour()) as url:
        command = Command(documents, tokenizer_folder, tmp_path / "out", url, target_length=100, chunk_tokens=40)
        status, _, err = command.run()
    assert status == 2
    assert "target_length=100: leaves no room" in err


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"chunk_tokens": 600}, "chunk_tokens=600: leaves no room for a document of target_length=600"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"timeout_s": float("nan")}, "timeout_s=nan"),
        ({"requests_per_minute": float("inf")}, "requests_per_minute=inf"),
        ({"price_input": float("nan")}, "price_input=nan"),
    ],
)
def test_settings_that_could_ask_or_count_nothing_are_refused(tokenizer_folder, tmp_path, settings, said):
    documents = jsonl(tmp_path / "documents.jsonl", [story(1, 6)])
    status, _, err = Command(documents, tokenizer_folder, tmp_path / "out", "http://127.0.0.1:9/v1", **settings).run()
    assert status == 2
    assert said in err


def test_a_key_that_no_header_can_hold_is_not_told(tokenizer_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-SECRET\nmore")
    documents = jsonl(tmp_path / "documents.jsonl", [story(1, 6)])
    status, out, err = Command(documents, tokenizer_folder, tmp_path / "out", "http://127.0.0.1:9/v1").run()
    assert status == 2
    assert "OPENAI_API_KEY" in err
    assert "SECRET" not in out + err

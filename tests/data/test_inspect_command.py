"""`nemo-longctx inspect`: from the index alone, without torch, and true to what a run gets."""

import csv
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from nemo_longctx.cli import main
from nemo_longctx.commands import inspect as command
from nemo_longctx.data.writer import CorpusWriter, write_index


def write(prefix, lengths):
    with CorpusWriter(prefix, np.uint16) as writer:
        for length in lengths:
            writer.add_document(np.arange(length) % 500)
    return str(prefix)


@pytest.fixture
def prefixes(tmp_path):
    rng = np.random.default_rng(0)
    books = rng.lognormal(6, 1, size=400).astype(int) + 1
    web = rng.lognormal(4, 1, size=2000).astype(int) + 1
    return [write(tmp_path / "books", books), write(tmp_path / "web", web)]


def inspect(capsys, *arguments):
    status = main(["inspect", *map(str, arguments), "--json"])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return json.loads(captured.out)


def test_natural_shares_and_the_files(prefixes, capsys):
    report = inspect(capsys, *prefixes, "--seq-length", 512)
    tokens = [source["tokens"] for source in report["sources"]]
    rows = report["plan"]["strata"]
    assert [row["name"] for row in rows] == ["books", "web"]
    for row, count in zip(rows, tokens, strict=True):
        assert row["asked_share"] == pytest.approx(count / sum(tokens))
        assert row["delivered_share"] == pytest.approx(row["asked_share"], abs=0.001)
        assert row["repeats_per_document"] == pytest.approx(1, abs=0.01)
    with open(f"{prefixes[0]}.lengths.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert sum(int(row["tokens"]) for row in table) == sum(tokens)
    with open(report["figure"], "rb") as file:
        assert file.read(8) == b"\x89PNG\r\n\x1a\n"


def test_a_picture_s_data_is_written_over_nothing_else(prefixes, tmp_path, capsys):
    (tmp_path / "books.csv").write_text("title,author\n")
    command = ["inspect", *prefixes, "--figure"]
    assert main([*command, str(tmp_path / "books.png")]) == 2
    assert "books.csv, which is something else; name another picture" in capsys.readouterr().err
    assert (tmp_path / "books.csv").read_text() == "title,author\n"
    assert not (tmp_path / "books.png").exists()
    for _ in range(2):  # its own it replaces
        assert main([*command, str(tmp_path / "lengths.png")]) == 0


def test_a_mix_is_told_with_what_it_delivers(prefixes, tmp_path, capsys):
    conf = tmp_path / "mix.yaml"
    sources = [{"path": path, "weight": weight} for path, weight in zip(prefixes, (0.3, 0.7), strict=True)]
    conf.write_text(json.dumps({"data": {"mix": {"sources": sources, "long_length": 128, "long_share": 0.6}}}))
    stages = (
        "{stages: [{until: 0.5, seq_length: 256}, {until: 1, seq_length: 1024}], tokens_per_step: 4096, total_tokens: 819200}"
    )
    report = inspect(capsys, "--mix", conf, "--curriculum", stages, "--no-figure")
    rows = {row["name"]: row for row in report["plan"]["strata"]}
    assert rows["books >= 128"]["asked_share"] == pytest.approx(0.18)
    assert rows["web >= 128"]["asked_share"] == pytest.approx(0.42)
    for row in rows.values():
        assert row["delivered_share"] == pytest.approx(row["asked_share"], abs=0.001)
        assert row["repeats_per_document"] == pytest.approx(row["asked_share"] * 819200 / row["tokens"])
    assert [sum(stage["delivered"]) for stage in report["plan"]["stages"]] == [409600, 409600]
    assert "figure" not in report
    assert not list(tmp_path.glob("*.png"))


def test_one_line_of_mix_over_prefixes(prefixes, capsys):
    report = inspect(capsys, *prefixes, "--mix", "{drop_longer: 100}", "--no-figure")
    assert sum(row["documents"] for row in report["plan"]["strata"]) < sum(s["documents"] for s in report["sources"])
    assert report["plan"]["total_tokens"] <= sum(row["tokens"] for row in report["plan"]["strata"])


def test_prefixes_give_the_paths_of_a_mix_that_has_names_and_weights(prefixes, capsys):
    mix = "{sources: [{path: gone, name: first, weight: 0.25}, {path: too, name: second, weight: 0.75}]}"
    report = inspect(capsys, *prefixes, "--mix", mix, "--no-figure")
    rows = [(row["name"], row["asked_share"]) for row in report["plan"]["strata"]]
    assert rows == [("first", 0.25), ("second", 0.75)]
    assert [source["path"] for source in report["sources"]] == prefixes


def test_a_mix_that_cannot_be_met_is_shown_and_fails(tmp_path, capsys):
    prefix = write(tmp_path / "few", [5000, 100, 100])
    arguments = [
        prefix,
        "--mix",
        "{long_length: 1000, long_share: 0.5}",
        "--total-tokens",
        "8192",
        "--no-figure",
        "--seq-length",
        "256",
    ]
    assert main(["inspect", *arguments]) == 2
    captured = capsys.readouterr()
    assert "few >= 1000" in captured.out
    assert "share_tolerance" in captured.err


def test_a_plan_counts_what_its_packing_reads(prefixes, capsys):
    mix = "{sources: [{weight: 0.5}, {weight: 0.5}], share_tolerance: 0.02}"
    arguments = [*prefixes, "--mix", mix, "--seq-length", "1024", "--no-figure"]
    plans = [inspect(capsys, *arguments, *more)["plan"] for more in ([], ["--packing", "best_fit"])]
    assert [plan["packing"] for plan in plans] == ["concatenate", "best_fit"]
    assert plans[0]["padding"] == 0
    assert plans[1]["padding"] > 0
    for plan in plans:
        assert sum(sum(stage["delivered"]) for stage in plan["stages"]) == plan["total_tokens"] - plan["padding"]
        assert sum(row["delivered_share"] for row in plan["strata"]) == pytest.approx(1)
    assert plans[0]["stages"] != plans[1]["stages"]


def test_a_plan_of_whole_windows_tells_how_many_tokens_were_given(prefixes, capsys):
    plan = inspect(capsys, *prefixes, "--total-tokens", "6500", "--seq-length", "4096", "--no-figure")["plan"]
    assert (plan["total_tokens"], plan["total_tokens_given"]) == (4096, 6500)
    assert main(["inspect", *prefixes, "--total-tokens", "6500", "--seq-length", "4096", "--no-figure"]) == 0
    assert "plan: 4,096 tokens (whole windows of the 6,500 given)" in capsys.readouterr().out


def test_shards_are_one_source(tmp_path, capsys):
    (tmp_path / "many").mkdir()
    for number in range(3):
        write(tmp_path / "many" / f"shard-{number}", [10, 20])
    [source] = inspect(capsys, tmp_path / "many")["sources"]
    assert (source["documents"], source["tokens"]) == (6, 90)
    assert os.path.exists(tmp_path / "many.lengths.png")


NO_TOKEN_READ = """
import re, sys
from nemo_longctx.cli import main
from nemo_longctx.data.mixture import Documents
opened, open_ = [], Documents.open
Documents.open = lambda mix: opened.append(open_(mix)) or opened[-1]  # keeps the maps for us to look at
status = main(["inspect", sys.argv[1], "--seq-length", "32768", "--json", "--no-figure"])
assert not {"torch", "transformers", "tokenizers", "nemo", "megatron"} & set(sys.modules)
resident = {}
for name, kilobytes in re.findall(r"/big\\.(bin|idx)\\n(?:(?!Rss).*\\n)*Rss: *(\\d+)", open("/proc/self/smaps").read()):
    resident[name] = resident.get(name, 0) + int(kilobytes)
print(resident, file=sys.stderr)
assert resident["idx"] > 0 and resident["bin"] == 0
sys.exit(status)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="asks the kernel which pages of a file were touched")
def test_no_token_is_read_and_no_torch_imported(tmp_path):
    """64 billion tokens that only exist as a hole in a file; the kernel says that no page of it was touched."""
    lengths = np.full(1_000_000, 64_000, np.int32)
    write_index(tmp_path / "big.idx", lengths, np.dtype(np.uint16))
    with open(tmp_path / "big.bin", "wb") as file:
        file.truncate(2 * int(lengths.sum(dtype=np.int64)))
    command = [sys.executable, "-c", NO_TOKEN_READ, str(tmp_path / "big")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["sources"][0]["tokens"] == 64_000_000_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a corpus"),
        (["gone"], "gone.idx is missing"),
        (["books", "books"], "is named twice; leave one out"),
        (["books", "./books/"], "is named twice; leave one out"),
        (["books", "--mix", "{drop_longr: 5}"], "did you mean 'drop_longer'"),
        (["books", "--mix", "nonsense"], "neither a file nor a YAML mapping"),
        (["books", "--mix", "{a: ["], "not YAML"),
        (["books", "--mix", "{sources: [{path: web}, {path: b}]}"], "the mix has 2 sources"),
        (["books", "--mix", "{drop_shorter: 1000000}"], "no document of 1000000"),
        (["books", "web", "--mix", "{sources: [books, web]}"], "data.mix.sources[0]='books': takes keys of its own"),
        (["books", "--mix", "{sources: {weight: 1.0}}"], "data.mix.sources={'weight': 1.0}: must be a list"),
        (["books", "--mix", "{sources: 5}"], "data.mix.sources=5: must be a list"),
        (["books", "--mix", ""], "neither a file nor a YAML mapping"),
        (["books", "--seq-length", "0"], "at least one token"),
        (["books", "--total-tokens", "0"], "total_tokens=0: a run has at least one window"),
        (["books", "--total-tokens", "100", "--seq-length", "4096"], "100 tokens hold none of 4,096"),
        (["books", "--seq-length", "100M"], "seq_length=100000000: a run has at least one window"),
        (["books", "--seq-length", "64", "--seed", "-1"], "seed=-1: a whole number of at least 0"),
        (["books", "--seed", "5"], "seed=5: it has no effect without a plan"),
        (["books", "--figure", "pictures/"], "figure='pictures/': is a folder; name a file in it: pictures/lengths.png"),
        (["books", "--packing", "best_fit"], "packing='best_fit': it has no effect without a plan"),
        (
            ["books", "--curriculum", "{stages: [{until: 0.5, seq_length: 4}], tokens_per_step: 4, total_tokens: 8}"],
            "end at 1.0",
        ),
    ],
)
def test_bad_input_is_one_sentence(prefixes, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", *arguments]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line
    assert not list(tmp_path.glob("*.png"))


def test_sources_of_two_tokenizers_are_told(prefixes, capsys):
    """Their shares were shown as of any mix, and a run refused it."""
    for number, prefix in enumerate(prefixes):
        with open(f"{prefix}.json", "w") as file:
            json.dump({"tokenizer": {"sha256": str(number), "vocab_size": 9}}, file)
    assert main(["inspect", *prefixes, "--no-figure"]) == 0
    assert "a run would refuse these sources: source web=" in capsys.readouterr().err


def test_a_lying_index_is_refused_before_any_figure(prefixes, capsys):
    with open(f"{prefixes[0]}.idx", "r+b") as file:
        file.seek(34)
        file.write((7).to_bytes(4, "little"))
    assert main(["inspect", *prefixes]) == 2
    assert "pointer of sequence 1 is not the sum" in capsys.readouterr().err


REPORT = {
    "sources": [
        {
            "name": "books", "documents": 1200, "tokens": 34567, "dtype": "uint16", "length": {"mean": 28.8, "max": 1999.0},
            "share_of_tokens_at_least": {"1024": 0.25, "4096": 0.0},
            "cut": {"seq_length": 2048, "concatenate_and_chunk": {"documents": 0.5, "tokens": 0.75},
                    "best_fit": {"documents": 0.125, "tokens": 0.0625}},
        },
        {"name": "web", "documents": 1, "tokens": 2, "dtype": "int32", "length": {"mean": 2.0},
         "share_of_tokens_at_least": {"8": 1.0}},
    ],
    "plan": {
        "total_tokens": 8192, "total_tokens_given": 9000, "packing": "best_fit", "padding": 1024,
        "strata": [
            {"name": "books >= 128", "documents": 12, "tokens": 3456, "asked_share": 0.25, "delivered_share": 0.251,
             "repeats_per_document": 1.5, "most_repeats": 2},
            {"name": "web", "documents": 1, "tokens": 2, "asked_share": 0.75, "delivered_share": 0.749,
             "repeats_per_document": 0.5, "most_repeats": 1},
        ],
        "stages": [{"seq_length": 1024, "tokens": 4096, "delivered": [1024, 3072]}],
    },
    "figure": "f.png",
}  # fmt: skip


def test_what_people_read_of_a_report(capsys):
    assert [command.percent(share) for share in (0, 1e-9, 0.00049, 0.0005, 0.123, 0.9994, 0.9995, 1 - 1e-9, 1)] == [
        "0.0%", "<0.1%", "<0.1%", "0.1%", "12.3%", "99.9%", ">99.9%", ">99.9%", "100.0%",
    ]  # fmt: skip
    command._print({"sources": [REPORT["sources"][0] | {"empty_documents": 12}]})
    assert ", beside 12 without any\n" in capsys.readouterr().out
    command._print(REPORT)
    assert capsys.readouterr().out.splitlines() == [
        "books: 1,200 documents, 34,567 tokens (uint16)",
        "  length: mean 29, max 1,999",
        "  tokens in documents >= 1,024: 25.0%, >= 4,096: 0.0%",
        "  cut by windows of 2,048:",
        "    concatenate and chunk: 50.0% of documents, with 75.0% of the tokens",
        "    best fit: 12.5% of documents, with 6.2% of the tokens",
        "web: 1 documents, 2 tokens (int32)",
        "  length: mean 2",
        "  tokens in documents >= 8: 100.0%",
        "plan: 8,192 tokens (whole windows of the 9,000 given), packing best_fit, 12.5000% padding",
        "                    documents            tokens     asked  delivered   repeats  at most",
        "  books >= 128             12             3,456   25.000%    25.100%     1.500        2",
        "  web                       1                 2   75.000%    74.900%     0.500        1",
        "  stage 0 (4,096 tokens in windows of 1,024): 25.000%, 75.000%",
        "figure: f.png, its data beside it as .csv",
    ]
    plan = {key: value for key, value in REPORT["plan"].items() if key != "total_tokens_given"} | {"packing": "concatenate"}
    command._print({"sources": [], "plan": plan})
    assert capsys.readouterr().out.splitlines()[0] == "plan: 8,192 tokens, packing concatenate"


def test_a_plan_without_words_is_one_pass_in_windows_of_4096_of_seed_1234(prefixes, capsys):
    plain = inspect(capsys, *prefixes, "--mix", "{}", "--no-figure")
    told = ["--seq-length", "4096", "--seed", "1234", "--packing", "concatenate"]
    assert inspect(capsys, *prefixes, *told, "--no-figure")["plan"] == plain["plan"]
    tokens = sum(source["tokens"] for source in plain["sources"])
    assert plain["plan"]["total_tokens"] == tokens // 4096 * 4096
    assert "plan" not in inspect(capsys, *prefixes, "--no-figure")
    other = inspect(capsys, *prefixes, "--seq-length", "4096", "--seed", "0", "--no-figure")["plan"]
    assert other["strata"] != plain["plan"]["strata"]
    assert inspect(capsys, *prefixes, "--seq-length", "1", "--total-tokens", "1", "--no-figure")["plan"]["total_tokens"] == 1


WITHOUT_EFFECT = [
    (["books", "--show", "0"], "show=0: how many windows to print, at least 1"),
    (["books", "--at", "5"], "at=5: it has no effect without --show"),
    (["books", "--source", "books"], "source='books': it has no effect without --show"),
    (["books", "--tokenizer", "t"], "tokenizer='t': it has no effect without --show"),
    (["books", "--document-masking"], "document_masking=True: it has no effect without --show"),
    (["books", "--chat-template", "llama2"], "chat_template='llama2': only conversations have it"),
    (["books", "--prompt-loss-weight", "0"], "prompt_loss_weight=0.0: only conversations have it"),
    (["books", "--figure", "x.png", "--no-figure"], "figure='x.png': it has no effect with --no-figure"),
    (["books", "--show", "1", "--seq-length", "64", "--source", "book"], "did you mean 'books'"),
    (["books", "--show", "1", "--seq-length", "64", "--total-tokens", "640", "--at", "640"], "at=640: the run has 640 tokens"),
    (["a.jsonl", "b.jsonl", "--show", "1", "--tokenizer", "t"], "a file of conversations; show some by --show N"),
    (["a.jsonl", "--tokenizer", "t"], "a file of conversations; show some by --show N"),
    (["a.jsonl", "--show", "1"], "a file of conversations; show some by --show N"),
    (["a.jsonl", "--show", "0", "--tokenizer", "t"], "show=0: how many conversations to print, at least 1"),
]
OF_TEXT = {"seq-length": 8, "mix": "m", "curriculum": "c", "total-tokens": 8, "packing": "best_fit", "seed": 8, "source": "s"}


def test_options_that_do_not_go_together_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "books", [100, 200, 3000])
    cases = list(WITHOUT_EFFECT)
    for name, value in OF_TEXT.items():
        argv = ["a.jsonl", "--show", "1", "--tokenizer", "t", f"--{name}", str(value)]
        cases.append((argv, f"{name.replace('-', '_')}={value!r}: it has no effect on conversations"))
    for name, value in (("figure", "x.png"), ("no-figure", True), ("json", True)):  # what they were for was left out in silence
        argv = ["a.jsonl", "--show", "1", "--tokenizer", "t", f"--{name}", *([value] if value is not True else [])]
        cases.append((argv, f"{name.replace('-', '_')}={value!r}: it has no effect on conversations"))
    for arguments, message in cases:
        assert main(["inspect", *arguments]) == 2
        assert message in capsys.readouterr().err, arguments
    assert not list(tmp_path.glob("*.png"))


def test_a_mix_is_found_below_the_keys_of_a_recipe(tmp_path):
    (tmp_path / "recipe.yaml").write_text("data: {mix: {drop_longer: 5}}\n")
    roots = ("mix",), ("data", "mix")
    assert command._yaml(str(tmp_path / "recipe.yaml"), "mix", *roots) == {"drop_longer": 5}
    assert command._yaml("{mix: {drop_longer: 6}}", "mix", *roots) == {"drop_longer": 6}
    assert command._yaml("{drop_longer: 7, data: 8}", "mix", *roots) == {"drop_longer": 7, "data": 8}

"""`nemo-longctx rope` as a user runs it, and the settings that ship with it."""

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from nemo_longctx.cli import main
from nemo_longctx.commands import rope
from nemo_longctx.config import ConfigError
from nemo_longctx.rope.request import parse_request
from nemo_longctx.rope.variants import VARIANTS, AbfRope, LongRope, Rope

CONF = sorted((Path(__file__).parents[2] / "conf" / "rope").glob("*.yaml"))


def test_show_json(capsys):
    assert main(["rope", "show", "--variant", "abf", "--base", "500000", "--head-dim", "128", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    np.testing.assert_array_equal(np.float32(facts["inv_freq"]), AbfRope(base=500_000.0).inv_freq(128))
    assert facts["attention_factor"] == 1.0
    assert facts["granularity_limit"] == pytest.approx(facts["paper"]["granularity_limit"], abs=5e-4)
    assert facts["raw_score_at_0"] == pytest.approx(facts["paper"]["raw_score_at_0"], abs=0.05)
    assert facts["granularity_bounds"][0] < facts["granularity"] < facts["granularity_bounds"][1]


def test_show_takes_every_field_by_its_name(capsys):
    argv = ["rope", "show", "--variant", "longrope", "--head-dim", "4", "--factor", "2", "--json"]
    argv += ["--short_factor", "1,1", "--long-factor", "1,4", "--original_max_position_embeddings", "64"]
    assert main(argv) == 0
    facts = json.loads(capsys.readouterr().out)
    made = LongRope(factor=2.0, short_factor=(1, 1), long_factor=(1, 4), original_max_position_embeddings=64)
    np.testing.assert_array_equal(np.float32(facts["inv_freq"]), made.inv_freq(4))
    assert (
        main(
            [
                "rope",
                "show",
                "--variant",
                "yarn",
                "--factor",
                "2",
                "--original_max_position_embeddings",
                "64",
                "--truncate",
                "false",
            ]
        )
        == 0
    )
    assert "truncate=False" in capsys.readouterr().out


def test_show_prints_both_tables(capsys):
    argv = ["rope", "show", "--variant", "pi", "--factor", "4", "--local-base", "1000", "--head-dim", "8"]
    assert main([*argv, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    np.testing.assert_array_equal(np.float32(facts["local_inv_freq"]), Rope(base=1000.0).inv_freq(8))
    assert main(argv) == 0
    said = capsys.readouterr().out
    assert "layers with a window: plain rope, base 1000" in said
    assert "with a window" in next(line for line in said.splitlines() if "inv_freq" in line)


def test_show_prints_xpos_scales(capsys):
    assert main(["rope", "show", "--variant", "xpos", "--head-dim", "8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["xpos_scale"][0] == pytest.approx(0.4 / 1.4)
    assert main(["rope", "show", "--variant", "xpos", "--head-dim", "8"]) == 0
    assert "xPos scale" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["show", "--variant", "abf", "--base", "big"], "not a number"),
        (["plot", "--variants", "pi:4"], "NAME:field=value"),
        (["advise", "--from", "8192", "--to", "4096"], "above the trained length"),
        (["advise", "--from", "0", "--to", "4096"], "--from=0: the trained length"),
        (["advise", "--from", "64", "--to", "128", "--png", "directory"], "--png='directory': must name a file"),
        (["advise", "--from", "64", "--to", "128", "--png", "directory/a.png"], "--png='directory/a.png': must name a file"),
        (["show", "--variant", "rope", "--seq-length", "0"], "--seq-length=0: must be 1 or more"),
        (["show", "--variant", "rope", "--rotary-percent", "2"], "--rotary-percent=2.0: the share"),
        (["show", "--variant", "rope", "--rotary-percent", "nan"], "--rotary-percent=nan: the share"),
        (["show", "--variant", "rope", "--spread", "nan"], "spread=nan: "),
        (["show", "--variant", "rope", "--spread", "inf", "--json"], "spread=inf: "),
        (["show", "--variant", "ntk", "--factor", "1e308", "--base", "1e300"], "beyond every number"),
        (["show", "--variant", "pi", "--factor", "1e308", "--base", "1e300", "--json"], "turns by 0.0 a token"),
        (["plot", "--variants", "pi:factor=1e308,base=1e300", "--figures", "wavelengths"], "turns by 0.0 a token"),
        (["plot", "--variants", "rope", "rope"], "--variants='rope': named twice"),
        (["plot", "--figures", "decay", "decay"], "--figures='decay': named twice"),
        (["plot", "--seq-length", "0"], "--seq-length=0: must be 1 or more"),
        (["plot", "--seq-length", "-3"], "--seq-length=-3: must be 1 or more"),
        (["plot", "--seq-length", "1T"], "--seq-length=1000000000000: is longer than any context: 16,777,216 tokens at most"),
        (["plot", "--figures", "helices", "--positions", "0"], "--positions=0: must be 2 or more"),
        (["plot", "--figures", "helices", "--positions", "-1"], "--positions=-1: must be 2 or more"),
        (["plot", "--figures", "helices", "--pair", "64"], "pair=64: must be between 0 and 63"),
        (["plot", "--pair", "3"], "--pair=3: has no effect on --figures decay; leave it out, or add helices"),
        (["plot", "--positions", "3"], "--positions=3: has no effect"),
        (["plot", "--figures", "helices", "--seq-length", "9"], "--seq-length=9: has no effect"),
        (["advise", "--from", "64", "--to", "128", "--new-base", "nan"], "--new-base=nan: must be a finite number"),
        (["advise", "--from", "64", "--to", "128", "--base", "inf"], "--base=inf: must be a finite number"),
        (["advise", "--from", "64", "--to", "128", "--bases", "1e4", "1"], "--bases=1.0: must be above 1"),
        (
            ["advise", "--from", "64", "--to", "128", "--new-base", "1.1e15"],
            "--new-base=1100000000000000.0: must be at most 1e+15",
        ),
        (["advise", "--from", "64", "--to", "128", "--head-dim", "7"], "--head-dim=7: RoPE turns pairs"),
        (["show", "--variant", "rope", "--head-dim", "0"], "--head-dim=0: RoPE turns pairs"),
        (["show", "--variant", "rope", "--rotary-percent", "0.01"], "--rotary-percent=0.01: RoPE turns pairs"),
        (["show", "--variant", "pi", "--factor", "0.5"], "--factor=0.5: must be at least 1"),
        (["show", "--variant", "pi", "--factor", "4", "--scale-base", "3"], "--scale-base=3: unknown key"),
        (["show", "--variant", "pi"], "rope.factor=None: missing"),
        (["plot", "--variants", "rope", "pi:factor=0.5"], "--variants='pi:factor=0.5': factor=0.5: must be at least 1"),
    ],
)
def test_mistakes_end_in_one_sentence(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "directory" / "a.png").mkdir(parents=True)
    assert main(["rope", *argv]) == 2
    said = capsys.readouterr().err
    assert f"error: {message}" in said if message.startswith("--") else message in said
    assert [path.name for path in tmp_path.iterdir()] == ["directory"]


def test_plot_writes_pictures_and_their_data(tmp_path, capsys):
    argv = ["rope", "plot", "--variants", "rope", "pi:factor=4", "--figures", "decay", "wavelengths", "helices"]
    assert main([*argv, "--head-dim", "16", "--seq-length", "500", "--out", str(tmp_path)]) == 0
    for name in capsys.readouterr().out.split():
        assert Path(name).stat().st_size > 200
    with (tmp_path / "decay.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["distance", "rope", "pi:factor=4"]
    assert len(rows) == 501
    assert [float(x) for x in rows[1]] == [0.0, 4.0, 4.0]
    with (tmp_path / "wavelengths.csv").open() as file:
        first = next(csv.DictReader(file))
    assert float(first["rope_tokens_a_turn"]) == pytest.approx(2 * math.pi)
    assert float(first["rope_turns_in_context"]) == pytest.approx(500 / (2 * math.pi))
    assert float(first["pi:factor=4_turns_in_context"]) == pytest.approx(125 / (2 * math.pi))


def test_advise_says_which_bases_keep_the_bound(tmp_path, capsys):
    argv = ["rope", "advise", "--from", "1024", "--to", "8192", "--bases", "10000", "500000"]
    assert main([*argv, "--json", "--png", str(tmp_path / "a.png")]) == 0
    facts = json.loads(capsys.readouterr().out)
    judged = {entry["base"]: entry["within_bound"] for entry in facts["bases"]}
    assert judged == {10_000.0: False, 500_000.0: True, facts["smallest_base"]: True}
    assert (tmp_path / "a.png").exists()
    assert main(argv) == 0
    assert "outside the bound from" in capsys.readouterr().out


def test_advise_gives_the_paper_s_practice_beside_the_bound(capsys):
    """The paper trained 500,000 at 32,768, where Men et al.'s bound asks for more: neither is called wrong by the other."""
    argv = ["rope", "advise", "--from", "4096", "--to", "32768"]
    assert main([*argv, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["practised_base"] == 500_000.0
    abf = [row["variant"]["base"] for row in facts["variants"] if row["variant"]["variant"] == "abf"]
    assert abf == [500_000.0, facts["smallest_base"]]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert out.startswith("From 4096 to 32768 tokens, head size 128, trained base 10000\n")
    practice = "Practice: what was trained and seen to work at 32768 tokens or more, from base 10000\n"
    assert f"\n\n{practice}  500000: Llama 2 Long (Xiong et al. 2023)" in out
    for said in (
        "reaches: first distance",
        "unseen pairs: pairs that meet",
        "\nBound: of the untrained score",
        "not keep it: ",
    ):
        assert f"\n{said}" in out
    assert f"smallest base for 32768 tokens: {facts['smallest_base']:.3g} (their fit 0.0424 L^1.628: " in out
    table = [line.split() for line in out.splitlines() if line.startswith(("variant ", "abf "))]
    assert [row[:2] for row in table] == [["variant", "base"], *(["abf", f"{base:.6g}"] for base in abf)]
    assert "too small" not in out
    assert main([*argv[:-1], "131072"]) == 0
    assert "no published base above it" in capsys.readouterr().out


def test_advise_takes_a_base_that_reaches_where_the_trained_one_does_not(capsys):
    """A base of 1e6 is above the smallest that reaches 32k, and yet scores a like key below a random one at 27,115."""
    argv = ["rope", "advise", "--from", "4096", "--to", "32768", "--base", "1000000"]
    assert main([*argv, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    judged = {entry["base"]: entry["reaches"] for entry in facts["bases"]}
    abf = [row for row in facts["variants"] if row["variant"]["variant"] == "abf"][-1]
    chosen = abf["variant"]["base"]
    assert facts["smallest_base"] < 1e6 < chosen == facts["smallest_base_from_trained"]
    assert judged[1e6] == 27_115
    assert judged[chosen] is None
    assert abf["reaches"] is None
    assert main(argv) == 0
    assert "smallest from the trained base 1e+06 up" in capsys.readouterr().out


def test_analysis_needs_no_torch():
    code = "import sys; from nemo_longctx.cli import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    argv = ["rope", "advise", "--from", "1024", "--to", "2048", "--json"]
    assert subprocess.run([sys.executable, "-c", code, *argv], stdout=subprocess.DEVNULL, check=False).returncode == 0


@pytest.mark.parametrize("path", CONF, ids=lambda p: p.stem)
def test_every_shipped_setting_parses(path):
    """They say what makes the variant; the numbers are the checkpoint's."""
    values = yaml.safe_load(path.read_text())
    divisors = {"short_factor": [1.0] * 64, "long_factor": [2.0] * 64} if values["variant"] == "longrope" else {}
    made = parse_request({**values, **divisors}).complete(Rope(base=10_000.0), seq_length=8192, trained=4096)
    assert made.variant.inv_freq(128).shape == (64,)
    assert not {"original_max_position_embeddings"} & values.keys()


def test_every_variant_ships_a_setting():
    assert {yaml.safe_load(p.read_text())["variant"] for p in CONF} == set(VARIANTS)


@pytest.mark.parametrize("variant", ["xpos", "pi"])
def test_the_text_of_show_is_the_json_s_numbers(variant, capsys):
    argv = [
        "rope",
        "show",
        "--variant",
        variant,
        "--head-dim",
        "8",
        "--seq-length",
        "2Ki",
        "--spread",
        "3",
        "--rotary-percent",
        "0.5",
    ]
    argv += ["--factor", "4", "--local-base", "1000"] if variant == "pi" else []
    assert main([*argv, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["head_dim"], facts["seq_length"], len(facts["inv_freq"]), facts["variant"]) == (8, 2048, 2, variant)
    assert main(argv) == 0
    first, *said = capsys.readouterr().out.splitlines()
    assert first.startswith(f"variant={variant}  base=")
    paper = facts["paper"]
    limit = "none" if facts["granularity_limit"] is None else f"{facts['granularity_limit']:.4f}"
    beside = {
        key: f"   (Xiong et al. 2023: {paper[key]})" if key in paper else "" for key in ("granularity_limit", "raw_score_at_0")
    }
    low, high = facts["granularity_bounds"]
    head = "pair      inv_freq   tokens a turn" + "turns in 2048".rjust(18)
    expected = ["layers with a window: plain rope, base 1000, attention factor 1"] if variant == "pi" else []
    expected += [
        f"attention factor   {facts['attention_factor']:.6g}",
        f"raw score at 0     {facts['raw_score_at_0']:.2f}{beside['raw_score_at_0']}",
        f"granularity C_d    {facts['granularity']:.4f}, for any x of spread 3: {low:.4f} to {high:.4f}",
        f"  as d grows       {limit}{beside['granularity_limit'] if limit != 'none' else ''}",
        f" {head}" + ("    xPos scale" if variant == "xpos" else "   with a window"),
    ]
    for j in range(2):
        line = f"{j:>5}{facts['inv_freq'][j]:>14.6g}{facts['wavelengths'][j]:>16.1f}{facts['turns'][j]:>18.3f}"
        more = f"{facts['xpos_scale'][j]:>14.6f}" if variant == "xpos" else f"{facts['local_inv_freq'][j]:>16.6g}"
        expected.append(line + more)
    assert said == expected


def test_the_text_of_advise_is_the_json_s_numbers(capsys):
    argv = ["rope", "advise", "--from", "16", "--to", "256", "--base", "1000", "--new-base", "30000", "--head-dim", "16"]
    argv += ["--bases", "500000", "200"]
    assert main([*argv, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["from"], facts["to"], facts["head_dim"]) == (16, 256, 16)
    assert [entry["base"] for entry in facts["bases"]] == [200, 1000, 30_000, 500_000]
    assert {row["variant"]["base"] for row in facts["variants"] if row["variant"]["variant"] in ("abf", "xpos")} == {30_000}
    assert main(argv) == 0
    said = capsys.readouterr().out.splitlines()
    for row in facts["variants"]:
        name, reaches = row["variant"]["variant"], ">256" if row["reaches"] is None else str(row["reaches"])
        assert (
            f"{name:<14}{row['variant']['base']:>12.6g}{row['granularity']:>13.4f}{row['attention_factor']:>13.4f}{reaches:>11}"
            f"{row['unseen_pairs']:>14}{row['score_at_target']:>17.2f}"
        ) in said
    for entry in facts["bases"]:
        verdict = "within the bound" if entry["within_bound"] else f"outside the bound from {entry['reaches']} on"
        line = next(line for line in said if line.startswith(f"  {entry['base']:>12g}  "))
        assert line[16:50].rstrip() == verdict
        assert line[50:] == "; ".join(entry["trained_by"])
    practised = [line for line in said if line.startswith(("  500000: ", "  no published base"))]
    assert len(practised) == 1
    assert any("Llama 2 Long" in name and "at 32,768" in name for entry in facts["bases"] for name in entry["trained_by"])


@pytest.mark.parametrize(
    ("text", "value"),
    [("3", 3), ("3.5", 3.5), ("1e3", 1000.0), ("True", True), ("false", False), ("1,2.5,x", (1, 2.5, "x")), ("word", "word")],
)
def test_what_a_value_s_text_means(text, value):
    found = rope._value(text)
    assert (found, type(found)) == (value, type(value))


def test_a_variant_in_one_word():
    made = rope._named("longrope:short_factor=1.0/1.0,long_factor=1.0/4.0,factor=2,original_max_position_embeddings=64")
    assert made == LongRope(factor=2.0, short_factor=(1, 1), long_factor=(1, 4), original_max_position_embeddings=64)
    assert rope._named("rope") == rope._named("rope:") == Rope()
    assert [rope._whole("--x", value, 7) for value in (None, 1, 9)] == [7, 1, 9]
    assert rope._whole("--x", 0, 7, least=0) == 0
    with pytest.raises(ConfigError, match="--x=1: must be 2 or more"):
        rope._whole("--x", 1, 7, least=2)
    assert main(["rope", "advise", "--from", "2", "--to", "3", "--head-dim", "4", "--json"]) == 0

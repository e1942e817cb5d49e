"""A plan as tables for a person."""

from __future__ import annotations

from typing import Any

from nemo_longctx.planning.layout import Layout
from nemo_longctx.planning.planner import FILL, Candidate


def as_text(plan: dict[str, Any], *, rows: int) -> str:
    """Tables for a person.

    Args:
        plan: of `make_plan`.
        rows: how many layouts of each verdict to show.
    """
    lines = _cost_lines(plan)
    if "layout" in plan:
        lines += _layout_lines(plan)
    if "at_mfu" in plan:
        at = plan["at_mfu"]
        lines += [
            "",
            f"at an MFU of {at['mfu']:.1%} ({at['convention']}): {_duration(at['hours'])}, "
            f"{_amount(at['gpu_hours'])} GPU-hours",
        ]
        lines[-1] += f", cost {_amount(at['cost'])}" if "cost" in at else ""
    if "search" in plan:
        lines += _search_lines(plan["search"], rows)
    if "longest" in plan:
        longest = plan["longest"]
        name = Layout(**longest["layout"]).short_name()
        lines += [
            "",
            f"longest sequence that fits: {longest['seq_length']:,} tokens by {name}, {longest['memory_gib']:.1f} GiB",
        ]
    lines += [f"\nnote: {note}" for note in plan["notes"]]
    return "\n".join(lines)


def _cost_lines(plan: dict[str, Any]) -> list[str]:
    convention, model = plan["convention"], plan["model"]
    head = "with the LM head" if convention["vocabulary"] else "without the LM head"
    layers = "12 h^2 a layer" if convention["layers"] == "12h2" else "exact layer sizes"
    lines = [
        f"{model['name']}: {_count(model['parameters'])} parameters, {_count(plan['tokens'])} tokens "
        f"in {plan['steps']:,} steps of {plan['tokens_per_step']:,}",
        f"convention {convention['name']}: {convention['attention']} attention, {layers}, {head}",
        "",
        f"{'length':>9} {'steps':>9} {'batch':>7} {'tokens':>9} {'FLOPs':>10} {'attention':>9} {'speed':>6}",
    ]
    for stage in plan["stages"]:
        lines.append(
            f"{stage['seq_length']:9,} {stage['steps']:9,} {stage['global_batch_size']:7,} {_short(stage['tokens']):>9} "
            f"{stage['flops']:10.3e} {stage['attention_share']:9.1%} {stage['relative_speed']:6.2f}"
        )
    lines += [
        "",
        f"total {plan['total_flops']:.3e} FLOPs; long from the start {plan['long_from_start_flops']:.3e}; "
        f"saving {plan['saving'] if abs(plan['saving']) >= 5e-4 else 0:.1%}",
        "executed with recomputation: " + ", ".join(f"{k} {v:.3e}" for k, v in plan["flops_with_recompute"].items()),
        f"crossover 6h = {plan['crossover_6h']:,} tokens"
        + (
            f"; attention overtakes the layers at {plan['crossover_tokens']:,.0f} in this convention"
            if plan["crossover_tokens"]
            else ""
        ),
    ]
    for row in plan["slow_down"]:
        shares = " and ".join(f"{share:.1%}" for share in row["attention_share"])
        lines.append(
            f"  {row['convention']:10} attention {shares} at {row['from']:,} and {row['to']:,}: "
            f"{row['slow_down']:.1%} slower (reported: {row['reported']:.0%})"
        )
    return lines


def _layout_lines(plan: dict[str, Any]) -> list[str]:
    layout, machine = plan["layout"], plan["machine"]
    on_cpu = "rates" not in layout
    lines = ["", f"{machine['gpus']} x {machine['name']}, {layout['short_name']}, {layout['precision']}"]
    if not on_cpu:
        error = layout["stated_error"]["time"]
        known = f"time within {error:.0%} of the runs they come from" if error else "no measured run stands behind the time"
        lines.append(f"  rates: {layout['rates']['source']} ({known})")
    for stage in layout["stages"]:
        if "verdict" in stage:
            lines.append(f"  {stage['seq_length']:,} tokens: {stage['verdict']}: {stage['reason']}")
            continue
        parts = {k: v for k, v in stage["memory_gib"].items() if k != "total" and v >= 0.05}
        fits = "fits" if stage["fits"] else f"does not fit: {stage['reason']}"
        speed = ""
        if not on_cpu:
            speed = f"; {stage['seconds_per_step']:.2f} s a step, {stage['tokens_per_second_per_gpu']:,.0f} tokens/s a GPU"
        total, room = stage["memory_gib"]["total"] * (machine["gpus"] if on_cpu else 1), machine["memory_gib"] * FILL
        lines.append(f"  {stage['seq_length']:,} tokens: {total:.1f} of {room:.1f} GiB, {fits}{speed}")
        lines.append("    " + ", ".join(f"{name} {gib:.1f}" for name, gib in parts.items()))
        host = f", {stage['host_gib']:.1f} GiB in host memory" if stage["host_gib"] else ""
        lines.append(
            f"    micro batch {stage['micro_batch_size']}, recompute {stage['recompute']}, offload {stage['offload']}{host}"
        )
    lines += _choice_lines(layout.get("activation_choices", []))
    if "hours" in layout:
        lines.append(f"  in all {_duration(layout['hours'])}, {_amount(layout['gpu_hours'])} GPU-hours")
        lines[-1] += f", cost {_amount(layout['cost'])}" if "cost" in layout else ""
        lines[-1] += "; of its steps: starts, validation, evaluations and checkpoints come on top"
    return lines


def _choice_lines(choices: list[dict[str, Any]]) -> list[str]:
    """Recomputation and offload at the longest stage: what each would save on a GPU and cost a step."""
    if not choices:
        return []
    lines = ["  what is kept for the backward pass, at the longest stage, against keeping all of it:"]
    lines.append(f"    {'recompute':10} {'offload':8} {'GiB':>7} {'saves':>7} {'on host':>8} {'s/step':>8} {'costs':>7}")
    for row in choices:
        memory = f"{row['memory_gib']:7.1f} {row['saves_gib']:7.1f} {row['host_gib']:8.1f}"
        lines.append(
            f"    {row['recompute']:10} {row['offload']:8} {memory} {row['seconds']:8.2f} {row['costs']:7.1%}"
            + ("" if row["fits"] else "  does not fit")
        )
    return lines


def _search_lines(ranked: list[dict[str, Any]], rows: int) -> list[str]:
    lines = ["", f"{len(ranked)} layouts", f"{'layout':34} {'GiB':>7} {'s/step':>8} {'tok/s/GPU':>9}  why"]
    groups = ((("fastest", "slower"), "are slower"), (("does not fit",), "do not fit"), (("cannot run",), "cannot run"))
    for verdicts, rest in groups:
        group = [row for row in ranked if row["verdict"] in verdicts]
        for row in group[:rows]:
            candidate = Candidate(**{**row, "layout": Layout(**row["layout"])})
            numbers = "                         "
            if candidate.memory_gib is not None:
                numbers = f"{candidate.memory_gib:7.1f} {candidate.seconds:8.2f} {candidate.tokens_per_second_per_gpu:9,.0f}"
            lines.append(f"{candidate.layout.short_name():34} {numbers}  {candidate.reason or candidate.verdict}")
        if len(group) > rows:
            lines.append(f"  ... and {len(group) - rows} more that {rest}")
    return lines


def _short(tokens: float) -> str:
    return f"{tokens / 1e9:.1f}B" if tokens >= 1e8 else f"{tokens / 1e6:.2f}M"


def _count(number: float) -> str:
    return f"{number / 1e9:,.2f} B" if number >= 1e8 else f"{number / 1e6:,.2f} M"


def _amount(value: float) -> str:
    """Whole numbers; of small ones what would be lost."""
    return f"{value:,.0f}" if value >= 100 or value == 0 else f"{value:.3g}"


def _duration(hours: float) -> str:
    if hours < 1:
        return f"{60 * hours:.3g} minutes"
    return f"{hours:.1f} hours" if hours < 48 else f"{hours / 24:.1f} days"

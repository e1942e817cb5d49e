"""Hours of a study by the plan, before it is started."""

import math

import pytest

from nemo_longctx.ablation.estimate import planned_hours
from nemo_longctx.ablation.study import BASE, load_study


def test_an_arm_s_hours_are_its_tokens_under_the_sizes_of_its_base(tmp_path):
    runs = {run.arm: run for run in reversed(load_study("position").runs("gpu", tmp_path))}
    base, arm = runs.pop(BASE).recipe(), next(iter(runs.values())).recipe()
    found = planned_hours({BASE: base, "arm": arm, "again": arm})
    assert list(found) == [BASE, "arm", "again"]
    assert all(0 < hours < math.inf for hours in found.values())
    assert found["arm"] == found["again"]
    faster = planned_hours({BASE: base, "arm": arm}, gpu="b200")
    assert all(faster[name] < found[name] for name in faster)
    assert planned_hours({BASE: base})[BASE] == pytest.approx(found[BASE])

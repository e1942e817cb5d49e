"""What the plan says that the training of a study takes on one GPU; starts and evaluations come on top."""

from __future__ import annotations

from collections.abc import Mapping

from nemo_longctx.planning.recipe import plan_of
from nemo_longctx.planning.report import PlanSettings, make_plan
from nemo_longctx.recipe import RunConfig


def planned_hours(recipes: Mapping[str, RunConfig], gpu: str = "h100") -> dict[str, float]:
    """Arm -> hours of training one seed of it on one GPU.

    Args:
        recipes: of each run of one seed in order: what begins from another has the sizes of the last that did not.

    Raises:
        ConfigError: a model that the planner does not know, or one that does not fit the GPU.
    """
    hours, base = {}, None
    for arm, recipe in recipes.items():
        plan = plan_of(recipe, gpu=gpu, named=base if recipe.restore_from else None)
        if not recipe.restore_from:
            base = plan.model_name, plan.model
        settings = PlanSettings(
            model_name=plan.model_name,
            model=plan.model,
            curriculum=plan.curriculum,
            gpu=gpu,
            layout=plan.layout,
            eval_length=plan.eval_length,
        )
        hours[arm] = make_plan(settings)["layout"]["hours"]
    return hours

"""Long-context continual pretraining for NVIDIA NeMo.

    from nemo_longctx import train, evaluate, export, prepare, plan

Importing this imports neither torch nor the host; the functions are those of `nemo_longctx.api`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_longctx.api import Trained, evaluate, export, import_hf, plan, prepare, train, tune

__all__ = ["Trained", "evaluate", "export", "import_hf", "plan", "prepare", "train", "tune"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from nemo_longctx import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

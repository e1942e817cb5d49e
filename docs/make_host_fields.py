"""Write nemo_longctx/host_fields.json: the host's GPT config classes and all fields that a recipe's `model` can name.

    python docs/make_host_fields.py

With it a slip in a field's name is refused before the host is imported. Run it again for another version of the host.
"""

from __future__ import annotations

import dataclasses
import json
from importlib import metadata
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent.parent / "nemo_longctx" / "host_fields.json"


def host_fields() -> dict[str, Any]:
    """Versions, names of classes, and names of fields, sorted."""
    from nemo.collections import llm
    from nemo.collections.llm.gpt.model.base import GPTConfig

    classes = {name: each for name, each in vars(llm).items() if isinstance(each, type) and issubclass(each, GPTConfig)}
    fields = {field.name for each in classes.values() for field in dataclasses.fields(each) if field.init}
    versions = {name: metadata.version(name) for name in ("nemo-toolkit", "megatron-core")}
    return {"versions": versions, "configs": sorted(classes), "fields": sorted(fields)}


if __name__ == "__main__":
    FILE.write_text(json.dumps(host_fields(), indent=1) + "\n", encoding="utf-8")

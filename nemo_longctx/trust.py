"""What a checkpoint of someone else's may make when it is read: only what an allow-list of packages holds.

A NeMo checkpoint says in `context/io.json` which classes and functions to call, by module and name, and the host calls them.
Its weights' index (`.metadata`) is a pickle, which can do the same. Both are looked through here first, and nothing of theirs
is imported before its package is known to be allowed. `NEMO_LONGCTX_TRUST=package,other` adds packages by name.
"""

from __future__ import annotations

import importlib
import json
import os
import pickletools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemo_longctx.config import ConfigError

OPENED = "NEMO_LONGCTX_TRUST"

# Packages whose classes and functions a model's description is made of.
PACKAGES = frozenset({"nemo", "nemo_longctx", "megatron", "lightning", "fiddle", "transformer_engine", "tokenizers"})
# Of packages that also hold what runs commands, loads files or compiles code: these modules, and what is inside them.
MODULES = (
    "torch.nn", "torch.optim", "torch.distributed.checkpoint", "torch.distributed.device_mesh", "torch.distributed.tensor",
    "torch.torch_version", "nemo_run.config", "nemo_run.core.frontend", "transformers.models", "transformers.generation",
    "transformers.tokenization_utils_fast", "transformers.tokenization_utils", "transformers.tokenization_utils_base",
    "transformers.configuration_utils", "collections", "pathlib", "datetime", "enum", "typing", "signal", "numpy.dtypes",
    "numpy._core", "numpy.core",
)  # fmt: skip
# And of these packages' roots: values and plain classes (of transformers any class).
NAMES: dict[str, frozenset[str] | None] = {
    "builtins": frozenset({"bool", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "object", "range", "set",
                           "slice", "str", "tuple", "type", "NoneType", "ellipsis"}),
    "torch": frozenset({"Size", "device", "dtype", "Tensor", "Generator", "memory_format", "layout", "strided", "bool", "uint8",
                        "int8", "int16", "int32", "int64", "short", "int", "long", "float16", "bfloat16", "float32", "float64",
                        "half", "float", "double", "float8_e4m3fn", "float8_e5m2", "preserve_format", "contiguous_format"}),
    "torch._utils": frozenset({"_rebuild_tensor_v2", "_rebuild_parameter"}),
    "torch.serialization": frozenset({"_get_layout"}),
    "numpy": frozenset(["dtype", "ndarray", "float32", "float64", "int32", "int64", "bool_"]),
    "functools": frozenset({"partial"}),
    "dataclasses": frozenset({"Field", "MISSING"}),
    "types": frozenset({"NoneType", "SimpleNamespace"}),
    "copyreg": frozenset({"_reconstructor"}),
    "_codecs": frozenset({"encode"}),
    "transformers": None,
}  # fmt: skip
# Of allowed packages, what only runs something that is named to it.
REFUSED = ("nemo.utils.import_utils", "megatron.core.jit", "lightning.app", "lightning.fabric.cli", "lightning.pytorch.cli")


def _opened() -> frozenset[str]:
    return frozenset(name.strip() for name in os.environ.get(OPENED, "").split(",") if name.strip())


def allowed(module: str, name: str) -> bool:
    """Whether `module.name` may be made from a file, by name alone: nothing is imported."""
    top = module.partition(".")[0]
    if top in _opened():
        return True
    if _inside(module, REFUSED) or "__" in f"{module}.{name}":
        return False
    if "." in name and not name[0].isupper():  # what is inside a class is the class's; inside anything else it is not
        return False
    if module in NAMES:
        names = NAMES[module]
        return name.partition(".")[0][:1].isupper() if names is None else name in names
    return top in PACKAGES or _inside(module, MODULES)


def _inside(module: str, roots: tuple[str, ...]) -> bool:
    return any(module == root or module.startswith(f"{root}.") for root in roots)


def check_reference(module: str, name: str, file: Path) -> None:
    """Refuse `module.name` where the list does not hold it, or holds it for something that it only passes on.

    A module that is allowed may have imported others: `nemo.x.subprocess.run`, or a `run` of its own that is subprocess's. So
    the value is looked up, in allowed packages only, and must come from one.

    Raises:
        ConfigError: it may not be made.
    """
    if not allowed(module, name):
        raise refused(module, name, file)
    try:
        value: Any = importlib.import_module(module)
        for part in name.split("."):
            value = getattr(value, part)
    except (ImportError, AttributeError):
        return  # not here: whoever builds it says so
    home = getattr(value, "__module__", None)
    if isinstance(value, type(os)):
        raise refused(module, name, file)
    if callable(value) and isinstance(home, str):
        here = getattr(value, "__qualname__", name)
        if not isinstance(value, type) and home.partition(".")[0] != module.partition(".")[0] and not allowed(home, here):
            raise refused(module, name, file)
        if isinstance(value, type) and not allowed(home, here) and home not in ("builtins", "torch"):
            raise refused(module, name, file)


def refused(module: str, name: str, file: Path) -> ConfigError:
    """The sentence for a reference that is not on the list."""
    top = module.partition(".")[0]
    what = "it would be called when the file is read, and is not of a package that checkpoints are made of"
    return ConfigError(str(file), f"{module}.{name}", f"{what}; if you trust whoever made it, set {OPENED}={top}")


def references(values: Any) -> Iterator[tuple[str, str]]:
    """All (module, name) that a fiddle JSON refers to, wherever they stand."""
    if isinstance(values, dict):
        if isinstance(values.get("module"), str) and isinstance(values.get("name"), str):
            yield values["module"], values["name"]
        for value in values.values():
            yield from references(value)
    elif isinstance(values, list):
        for value in values:
            yield from references(value)


def _runs_remote_code(values: Any) -> bool:
    """Whether something in a fiddle JSON is given `trust_remote_code=True`."""
    if isinstance(values, dict):
        return any(_runs_remote_code(value) for value in values.values())
    if not isinstance(values, list):
        return False
    pair = len(values) == 2 and isinstance(values[0], str) and "trust_remote_code" in values[0]
    if pair and (values[1].get("value") if isinstance(values[1], dict) else values[1]) is True:
        return True
    return any(_runs_remote_code(value) for value in values)


def check_context(directory: Path) -> None:
    """Look through a checkpoint's `context/`: every reference of its `io.json`, and pickles beside it.

    Raises:
        ConfigError: one that may not be made, or code from a model hub that its tokenizer would run.
    """
    path = directory / "io.json"
    if not path.is_file():
        return
    try:
        values = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ConfigError(str(path), "unreadable", f"is not JSON ({error}); copy the checkpoint again") from error
    found = sorted(set(references(values)))
    for module, name in found:  # all names first: nothing is imported for a file that is refused
        if not allowed(module, name):
            raise refused(module, name, path)
    for module, name in found:
        check_reference(module, name, path)
    if _runs_remote_code(values) and "transformers" not in _opened():
        mend = f"its tokenizer would run code that comes with it; if you trust whoever made it, set {OPENED}=transformers"
        raise ConfigError(str(path), "trust_remote_code=True", mend)
    for file in sorted({*directory.rglob("*.pkl"), *directory.rglob("*.pickle")}):
        check_pickle(file)


def check_pickle(path: Path) -> None:
    """Refuse a pickle that refers to what may not be made; it is read as a list of operations, never run.

    Raises:
        ConfigError: such a reference, or one whose name only shows when the pickle runs.
    """
    strings: list[str | None] = []
    memo: dict[int, str | None] = {}
    with path.open("rb") as file:
        for operation, argument, _ in pickletools.genops(file):
            code = operation.name
            if code in ("GLOBAL", "INST"):
                module, _, name = str(argument).partition(" ")
                check_reference(module, name, path)
                strings.append(None)
            elif code == "STACK_GLOBAL":
                module_, name_ = [*[None, None], *strings][-2:]
                if module_ is None or name_ is None:
                    raise refused("a name", "made by the pickle itself", path)
                check_reference(module_, name_, path)
                strings.append(None)
            elif code in ("PUT", "BINPUT", "LONG_BINPUT"):
                memo[int(argument or 0)] = strings[-1] if strings else None
            elif code == "MEMOIZE":
                memo[len(memo)] = strings[-1] if strings else None
            elif code in ("GET", "BINGET", "LONG_BINGET"):
                strings.append(memo.get(int(argument or 0)))
            elif isinstance(argument, str) and "UNICODE" in code:
                strings.append(argument)
            elif code not in ("PROTO", "FRAME", "MARK", "STOP"):
                strings.append(None)
            del strings[:-2]


def check_checkpoint(directory: str | Path) -> None:
    """`check_context`, and the index of the weights.

    Raises:
        ConfigError: as they do.
    """
    check_context(Path(directory) / "context")
    index = Path(directory) / "weights" / ".metadata"
    if index.is_file():
        check_pickle(index)


def check_targets(values: Any, where: str = "") -> None:
    """Refuse a `_target_` of a YAML that is not on the list.

    Raises:
        ConfigError: by the key under which it stands.
    """
    if isinstance(values, dict):
        target = values.get("_target_")
        if target is not None:
            module, _, name = str(target).rpartition(".")
            if not allowed(module, name):
                top = module.partition(".")[0]
                mend = f"is not of a package that recipes are made of; if you trust this file, set {OPENED}={top}"
                raise ConfigError(f"{where}._target_".lstrip("."), target, mend)
        for key, value in values.items():
            check_targets(value, f"{where}.{key}".lstrip("."))
    elif isinstance(values, list):
        for place, value in enumerate(values):
            check_targets(value, f"{where}[{place}]")

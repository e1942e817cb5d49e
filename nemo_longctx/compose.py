"""Hydra over conf/: a recipe's YAML and `key=value` overrides become one plain mapping.

The compose API is used rather than `@hydra.main`, so that an unknown key ends in the schema's own message, no working
directory is made, and tests and Python call what the command line calls.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_longctx.config import ConfigError, did_you_mean
from nemo_longctx.effects import refuse_idle
from nemo_longctx.overrides import places, readable, typed_keys
from nemo_longctx.scale import scaled
from nemo_longctx.trust import check_targets

CONF_DIR = Path(__file__).parent / "conf"


def groups(conf_dir: Path = CONF_DIR) -> dict[str, list[str]]:
    """Config groups and their choices: `{"rope": ["abf", "pi", ...], ...}`."""
    # Studies are files of their own, read by `nemo-longctx ablate`: no group of a run.
    folders = sorted(folder for folder in conf_dir.iterdir() if folder.is_dir() and folder.name != "ablation")
    return {folder.name: sorted(file.stem for file in folder.glob("*.yaml")) for folder in folders}


def compose(overrides: Sequence[str], *, config_name: str = "config", conf_dir: Path = CONF_DIR) -> dict[str, Any]:
    """Compose `conf_dir/config_name.yaml` with `overrides` (`recipe=tiny_cpu_long`, `optimizer.lr=1e-4`).

    Raises:
        ConfigError: an override that is not `key=value`, or an unknown choice of a group.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from omegaconf import OmegaConf

    known = groups(conf_dir)
    _refuse_two_ways(overrides, known)
    emptied = _emptied(overrides, known)
    kept = [item for item in overrides if item.partition("=")[0] not in emptied]
    machine = chosen_machine(overrides, conf_dir)
    # Behind the recipe, which may say a cluster's layout; before the other overrides, which may say another one.
    ours = [f"++trainer.{key}={'null' if value is None else value}" for key, value in machine.items()]

    def composed(items: Sequence[str]) -> dict[str, Any]:
        config = hydra_compose(config_name, overrides=[*ours, *(_override(item, known) for item in items)])
        return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]

    with initialize_config_dir(config_dir=str(conf_dir.resolve()), version_base="1.3"):
        try:
            values = composed(kept)
            if values.get("scale") is None:
                values.pop("scale", None)
            else:
                chosen = [item for item in kept if item.partition("=")[0] in known and "={" not in item]
                said = [item.lstrip("+~").partition("=")[0] for item in kept if item not in chosen]
                values = scaled(values, recipe=composed(chosen), said=said)
        except ConfigError:
            raise
        except Exception as error:  # Hydra's own, and what its parser and PyYAML let through
            raise _explained(error, overrides) from error
    for group in known:
        if isinstance(values.get(group), str):
            mend = f"holds keys of its own; a choice stands in a recipe's defaults: `- override /{group}: {values[group]}`"
            raise ConfigError(group, values[group], mend)
    check_targets(values)
    values = places(values)
    if machine and not any(item.startswith("curriculum") for item in overrides):
        _leave_layout(values)
    refuse_idle(values, typed_keys(item for item in kept if item.partition("=")[0] not in known or "={" in item))
    return {str(key): value for key, value in values.items()} | dict.fromkeys(emptied)


def chosen_machine(overrides: Sequence[str], conf_dir: Path = CONF_DIR) -> dict[str, Any]:
    """What a `trainer=CHOICE` among the overrides says: one word sets all of a machine, whatever layout the recipe has."""
    import yaml

    choices = [item.partition("=")[2] for item in overrides if item.startswith("trainer=") and item[8:9] not in ("", "{")]
    file = conf_dir / "trainer" / f"{choices[-1]}.yaml" if choices else None
    if file is None or not file.is_file():
        return {}
    return yaml.safe_load(file.read_text(encoding="utf-8")) or {}


def _leave_layout(values: dict[str, Any]) -> None:
    """Take the sizes of another machine from the recipe's stages, which then have the trainer's."""
    for stage in (values.get("curriculum") or {}).get("stages") or ():
        for key in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size", "offload"):
            stage.pop(key, None)


def recipe_file(value: str) -> Path | None:
    """The file that `recipe=VALUE` names where VALUE is a path to a YAML file (`./mine.yaml`), not a choice of conf/recipe/.

    Raises:
        ConfigError: no such file.
    """
    if not value.endswith((".yaml", ".yml")):
        return None
    path = Path(value)
    if not path.is_file():
        raise ConfigError("recipe", value, "no such file; give a recipe of your own, or a choice of conf/recipe/ without .yaml")
    return path


_KEY = re.compile(r"[^\W\d][\w-]*(?:\.\w+)*", re.ASCII)


_NO_JOB = "has no effect: no job of Hydra's is started; the run's directory is output_dir/name"


def _refuse_two_ways(overrides: Sequence[str], known: Mapping[str, Any]) -> None:
    """Refuse a variant of RoPE that is chosen and written out too (`rope=abf rope={variant: pi}`): the second is laid over the
    first, whichever comes last, and keeps its numbers; and Hydra's own settings, which nothing here heeds."""
    written = {}
    for item in overrides:
        key, _, value = item.lstrip("+~").partition("=")
        if key.partition(".")[0] == "hydra" or key.startswith("hydra/"):
            raise ConfigError(key, value, _NO_JOB)
        if key == "rope" and value.startswith("{") and "variant" in value:
            written[key] = value
    for item in overrides:
        key, _, value = item.partition("=")
        if key in written and value in known.get(key, ()):
            mend = f"{key}={written[key]} beside it would be laid over it, and keep its numbers; leave one out"
            raise ConfigError(key, value, mend)


def _emptied(overrides: Sequence[str], known: Mapping[str, Any]) -> list[str]:
    """Groups that `group=null` takes away: Hydra has no word for that where a recipe chose one."""
    emptied = [item.partition("=")[0] for item in overrides if item.partition("=")[2] == "null"]
    emptied = [group for group in emptied if group in known]
    for group in ("recipe", "sft"):
        if group in emptied:
            own = ", or a file of your own" if group == "recipe" else ""
            raise ConfigError(group, None, f"name one: {', '.join(known[group])}{own}")
    for item in overrides:
        group, dot, _ = item.lstrip("+~").partition("=")[0].partition(".")
        if group in emptied and (dot or not item.endswith("=null")):
            raise ConfigError(item.partition("=")[0], item.partition("=")[2], f"{group}=null leaves none of it; leave one out")
    return emptied


def _explained(error: Exception, overrides: Sequence[str]) -> ConfigError:
    """Hydra's error by the override that it is about; by all of them where none is named."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    words = " ".join(str(error).split()) or type(error).__name__
    for item in overrides:
        key, equals, value = item.partition("=")
        try:
            OverridesParser.create().parse_override(_override(item, {}) if equals and key else item)
        except Exception:  # the error that is being told says why
            mend = "cannot be read: put text with characters of its own meaning in quotes, and these in quotes of the shell"
            return ConfigError(*((key, value) if equals and key else ("override", item)), f"{mend} ({words})")
    if (found := re.search(r"Could not override '([^']+)'\. No match in the defaults list", words)) is not None:
        chosen = next((each.partition("=")[2] for each in overrides if each.startswith(f"{found[1]}=")), None)
        if found[1] not in (there := groups(CONF_DIR)):
            recipe = next((each.partition("=")[2] for each in overrides if each.startswith("recipe=")), None)
            mend = f"its defaults override /{found[1]}, which is no group: {did_you_mean(found[1], there)}"
            return ConfigError("recipe", recipe, mend)
        mend = f"this command has no such group; write its keys: {found[1]}.NAME=VALUE"
        if found[1] in ("recipe", "sft"):
            mend = "this command has no such group: `nemo-longctx train` takes recipe=NAME, `nemo-longctx sft` takes sft=NAME"
        return ConfigError(found[1], chosen, mend)
    if (found := re.search(r"Interpolation key '([^']+)' not found", words)) is not None:
        key = _who_says(f"${{{found[1]}}}", overrides) or "overrides"
        return ConfigError(
            key, f"${{{found[1]}}}", f"no setting has this name; an environment variable is ${{oc.env:{found[1]}}}"
        )
    if (found := re.search(r"In '([^']+)': Could not (?:find|load) '([^']+)'", words)) is not None:
        own = next((each.partition("=")[2] for each in overrides if each.startswith("recipe=")), found[1])
        group, _, choice = found[2].rpartition("/")
        known = groups(CONF_DIR).get(group)
        mend = did_you_mean(choice, known) if known else f"no such group; {did_you_mean(group, groups(CONF_DIR))}"
        return ConfigError("recipe", own, f"its defaults name {found[2]}, which is not there: {mend}")
    if (found := re.search(r"Error merging override \+\+([\w.]+)=(.*)", words)) is not None:
        return ConfigError(found[1], found[2], "is of another kind than what it replaces: give a list in [], a mapping in {}")
    if "Cannot merge" in words and (own := [each.partition("=")[2] for each in overrides if each.startswith("recipe=")]):
        mend = (
            "a list stands there where keys of their own belong, or the reverse (curriculum.stages is a list, trainer is none)"
        )
        return ConfigError("recipe", own[-1], f"{mend} ({words})")
    if (found := re.search(r"Environment variable '([^']+)' not found.* full_key: (\S+)", words)) is not None:
        key = _who_says(f"${{oc.env:{found[1]}}}", overrides) or found[2]
        return ConfigError(key, f"${{oc.env:{found[1]}}}", "no such environment variable; export it, or write the value")
    if (found := re.search(r"An item is already at '([^']+)'", words)) is not None:
        item = next((each for each in overrides if each.startswith(f"+{found[1]}=")), "")
        return ConfigError(found[1], item.partition("=")[2], f"it has a value already; write {item.lstrip('+')}")
    if (found := re.search(r"Could not delete from config\. '([^']+)' does not exist", words)) is not None:
        return ConfigError(f"~{found[1]}", None, "there is no such key to take away; leave it out")
    if (found := re.search(r"full_key: (\S+)", words)) is not None:
        key = found[1].partition("[")[0]
        said = next((each.partition("=")[2] for each in overrides if each.startswith(f"{key}=")), None)
        return ConfigError(key, said, f"cannot be worked out: {words.partition(' full_key:')[0]}")
    return ConfigError("overrides", list(overrides), words)


def _who_says(text: str, overrides: Sequence[str]) -> str | None:
    """The key of the command line, or of a recipe of the user's own, whose value holds `text`; None: of none."""
    import yaml

    for item in overrides:
        key, _, value = item.lstrip("+").partition("=")
        if text in value:
            return key
        if key == "recipe" and (file := recipe_file(value)) is not None:
            for inside, said in _flat(yaml.safe_load(file.read_text(encoding="utf-8"))):
                if text in str(said):
                    return inside
    return None


def _flat(values: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(values, Mapping):
        yield key, values
        return
    for name, value in values.items():
        yield from _flat(value, f"{key}.{name}" if key else str(name))


def _own_recipe(file: Path) -> str:
    """Make a user's recipe file a choice of the group `recipe`, as if it lay in conf/recipe/; its name there."""
    import yaml
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:  # as Hydra reads its files: 5e5 is a number, and a key that comes twice an error
        values = OmegaConf.to_container(OmegaConf.load(file))
    except UnicodeDecodeError as error:
        raise ConfigError("recipe", str(file), f"is no text in UTF-8: {error}") from error
    except (yaml.YAMLError, OmegaConfBaseException, OSError) as error:
        raise ConfigError("recipe", str(file), f"is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError("recipe", str(file), "must be a mapping, such as {defaults: [llama2_7b, _self_], trainer: {...}}")
    if "hydra" in values:
        raise ConfigError("hydra", values["hydra"], _NO_JOB)
    name = "own_" + re.sub(r"\W", "_", file.stem, flags=re.ASCII)  # what Hydra reads as one word
    ConfigStore.instance().store(group="recipe", name=name, node=values, package="_global_", provider=str(file))
    return name


def _override(item: str, known: dict[str, list[str]]) -> str:
    """Check one override; a value's key may be new to the YAML, since the schema is what knows the keys."""
    key, equals, value = item.partition("=")
    if key == "recipe" and (file := recipe_file(value)) is not None:
        return f"recipe={_own_recipe(file)}"
    if item.startswith(("+", "~")):
        return item
    if not equals or not key:
        named = item in known.get("recipe", ()) or item.endswith((".yaml", ".yml"))
        meant = f"recipe={item}" if named else "key=value, for example recipe=tiny_cpu_long or optimizer.lr=1e-4"
        raise ConfigError("override", item, f"write {meant}")
    if key in known and not value.startswith("{"):
        if value not in known[key]:
            if key == "recipe" and (own := [f for f in (f"{value}.yaml", f"{value}.yml") if Path(f).is_file()]):
                raise ConfigError(key, value, f"no such choice; if the file is meant: recipe={own[0]}")
            raise ConfigError(key, value, f"no such choice, {did_you_mean(value, known[key])}")
        return item
    if not _KEY.fullmatch(key) and "/" not in key:
        items = "; an item of a list is named by its number, as data.validation.0.samples=4" if "[" in key else ""
        raise ConfigError(key, value, f"is no key: names with a dot between two of them, such as trainer.devices=2{items}")
    if "." not in key and (near := difflib.get_close_matches(key, known, n=1, cutoff=0.8)) and near[0] != key:
        raise ConfigError(key, value, f"unknown key, did you mean {near[0]!r}?")  # recipe is no key of the schema
    return f"++{key}={readable(key, value)}"

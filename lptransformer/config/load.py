"""The configuration of a run: a YAML file, dotted overrides, and one clear message for every mistake.

Whatever the configuration alone can show is refused here, before anything slow is imported. The sections with their
keys are in config/schema.py, the checks between keys in config/checks.py. A null means "as if not given". Every
value remembers where it came from, so that messages can say it.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from lptransformer import hub
from lptransformer.config import deepspeed_keys, pretrained
from lptransformer.config.checks import check
from lptransformer.config.schema import (
    ALSO_CALLED,
    BY_DEFAULT,
    BY_PROGRAM,
    COMMAND_LINE,
    MOMENTUM,
    ONLY_WITH,
    PLAIN,
    RENAMED,
    ROWS,
    SECTIONS,
    Config,
    Source,
    fields_of,
    is_typed,
    known_keys,
    origin_of,
    section_type,
    translated,
)
from lptransformer.config.text import dump_yaml, parse_yaml, read_json, read_text
from lptransformer.errors import ConfigError, ModelError, NoMeaningError
from lptransformer.methods.codecs import CODECS
from lptransformer.section import Section

Validated = TypeVar("Validated", bound=Section)
# Names of the sizes in config.json of Hugging Face model folders.
SIZES = {
    "family": ("model_type",),
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "num_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "num_heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "intermediate_size": ("intermediate_size", "n_inner", "ffn_dim"),
    "num_key_value_heads": ("num_key_value_heads",),
    "max_position_embeddings": ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"),
}
NEEDED_SIZES = ("family", "hidden_size", "num_layers")


def load(
    source: str | Path | dict[str, Any],
    overrides: Sequence[str] = (),
    *,
    saved: bool = False,
    given: Mapping[str, Any] | None = None,
) -> Config:
    """The checked configuration from a YAML file or a mapping, with overrides such as "--train.steps=200".

    Values of overrides are YAML; they reach into mappings (deepspeed.zero_optimization.stage=2). What is null by
    default and follows from other keys is filled in: run.dir, max_position_embeddings, and for model.pretrained the
    sizes in its config.json and its tokenizer. `saved` says that a run folder holds it: keys may have their old names,
    and the sizes of model.pretrained are there, so no model folder is opened. `given` are dotted keys with values that
    a program has as arguments of its own: they win over overrides, and count as typed.

    What an override leaves without meaning gives way, where it was not typed too: `notes` of the configuration has a
    line for each (`--objective.name=backprop` over a file that sets objective.chunks).

    Raises ConfigError, and ModelError when the folder model.pretrained is missing or its config.json is broken, or the
    hub does not give it.
    """
    if isinstance(source, dict):
        origin, raw = "in the given mapping" if source else "no file is given", copy.deepcopy(source)
    else:
        origin, raw = f"in {source}", parse_yaml(read_text(source, "the configuration"), str(source))
        if not isinstance(raw, dict):
            found = "is empty" if raw is None else f"holds {raw!r:.80}"
            raise ConfigError(f"{source} {found}: a configuration is a mapping of sections ({', '.join(SECTIONS)})")
    if saved:
        raw = translated(raw)
    origins: dict[str, str] = {}
    sections = _admit(raw, origin, origins)
    for text in overrides:
        _override(sections, text, origins)
    for key, value in (given or {}).items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
        origins[key] = BY_PROGRAM
    notes: list[str] = []
    while True:
        try:
            config = _resolved(copy.deepcopy(sections), dict(origins), source, origin, saved)
        except NoMeaningError as error:
            notes += _give_way(error, sections, origins)
        else:
            config._notes = notes
            return config


def _give_way(error: NoMeaningError, sections: dict[str, Any], origins: dict[str, str]) -> list[str]:
    """Go on without what a typed value leaves without meaning; says so. Raises the error where that cannot be."""

    def cause(key: str) -> str:  # a pretrained model brings its tokenizer
        return "model.pretrained" if key == "data.tokenizer" and key not in origins else key

    given = [key for key in error.keys if origin_of(key, origins) != BY_DEFAULT]
    typed = [cause(key) for key in error.beside if is_typed(cause(key), origins)]
    if any(is_typed(key, origins) for key in given) or (not typed if given else error.instead is None):
        raise error
    lines = []
    for key in error.keys:
        section, _, name = key.rpartition(".")
        keys = sections.setdefault(section, {}) if section else sections
        if key in given:
            does = "is left out" if error.instead is None else f"becomes {error.instead!r}"
            lines.append(f"{_at(key, sections, origins)} {does}, with {_at(typed[0], sections, origins)}")
        keys.pop(name, None)
        origins.pop(key, None)
        if error.instead is not None:
            keys[name] = error.instead
            origins[key] = f"from {(typed or error.beside)[0]}{f' {COMMAND_LINE}' if typed else ''}"
    return lines


def _at(key: str, sections: dict[str, Any], origins: dict[str, str]) -> str:
    section, _, name = key.rpartition(".")
    value = sections.get(section, {}).get(name) if section else sections.get(name)
    return f"{key} = {value!r} ({origin_of(key, origins)})"


def _resolved(
    sections: dict[str, Any], origins: dict[str, str], source: str | Path | dict[str, Any], origin: str, saved: bool
) -> Config:
    """The configuration of these sections, checked."""
    given: dict[str, Any] = {}
    for key in PLAIN:
        if sections.get(key) is not None:
            given[key] = sections[key]
        else:
            origins.pop(key, None)
    for section in SECTIONS:
        keys = sections.get(section, {})
        given[section] = {key: value for key, value in keys.items() if value is not None}
        for key in keys.keys() - given[section].keys():
            del origins[f"{section}.{key}"]
    for table in ("zero_optimization", "data_types"):
        if isinstance(given["deepspeed"].get(table), dict):
            options = given["deepspeed"][table]
            given["deepspeed"][table] = {key: value for key, value in options.items() if value is not None}
    for key, _ in deepspeed_keys.entries(given["deepspeed"]):
        if not deepspeed_keys.is_known(key):
            raise _unknown(f"deepspeed.{key}", origin_of(f"deepspeed.{key}", origins))
    given["objective"] = _options_of_row("objective", given["objective"], origin, origins)
    if isinstance(given["model"].get("pretrained"), str) and not saved:
        at = _at("model.pretrained", given, origins)
        folder = hub.folder(given["model"]["pretrained"], at)
        pretrained.fill_in(given, origins, _pretrained_sizes(folder / "config.json", at)["num_layers"])
    given["head"] = _options_of_row("head", given["head"], origin, origins)
    codec = given["border"].get("codec", "none")
    if not isinstance(codec, str) or codec not in CODECS:
        raise _no_row("border.codec", codec, CODECS, origin_of("border.codec", origins))
    config = _validated(Config, given, (), origin, origins)
    config._origins.update(origins)
    _resolve(config, source, saved)
    check(config)
    return config


def _validated(
    kind: type[Validated], values: dict[str, Any], above: tuple[str, ...], origin: str, origins: dict[str, str]
) -> Validated:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        unknown_first = sorted(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
        raise _wrong_value(unknown_first[0], kind, above, origin, origins) from None


def _options_of_row(section: str, values: dict[str, Any], origin: str, origins: dict[str, str]) -> Section:
    """The options of the row that a section names: those of its class and no others."""
    key, rows = ROWS[section]
    name = values.get(key, section_type(section).model_fields[key].default)
    if not isinstance(name, str) or name not in rows:
        raise _no_row(f"{section}.{key}", name, rows, origin_of(f"{section}.{key}", origins))
    of_row = section_type(section, name)
    for other, value in values.items():
        if other not in of_row.model_fields:
            message = (
                f"{section}.{other} = {value!r} ({origin_of(f'{section}.{other}', origins)}) has no meaning with "
                f"{section}.{key} = {name!r} ({origin_of(f'{section}.{key}', origins)}): remove it (or give null)"
            )
            raise NoMeaningError(message, [f"{section}.{other}"], [f"{section}.{key}"])
    return _validated(of_row, values, (section,), origin, origins)


def _no_row(key: str, value: Any, rows: Mapping[str, Any], at: str) -> ConfigError:
    near = difflib.get_close_matches(value, rows, n=1) if isinstance(value, str) else []
    hint, change = (f"; did you mean {near[0]}?", {f"--{key}={value}": f"--{key}={near[0]}"}) if near else ("", None)
    return ConfigError(f"{key} = {value!r} ({at}): must be one of {', '.join(rows)}{hint}", change=change)


def _admit(raw: dict[Any, Any], origin: str, origins: dict[str, str]) -> dict[str, Any]:
    """The sections of `raw` as mappings of known keys; notes in `origins` where every key came from."""
    sections: dict[str, Any] = {}
    for section, keys in raw.items():
        if section in PLAIN:
            sections[section], origins[section] = keys, origin
            continue
        if section not in SECTIONS:
            raise _unknown(str(section), origin)
        at = origin
        if section == "deepspeed" and isinstance(keys, str):
            at = f"in {keys}"
            keys = read_json(keys, f"deepspeed = {keys!r} ({origin})")
        if not isinstance(keys, dict | None):
            wanted = "a mapping of its keys" + (" or the path of a DeepSpeed JSON" if section == "deepspeed" else "")
            raise ConfigError(f"{section} = {keys!r} ({origin}): must be {wanted}")
        sections[section] = dict(keys or {})
        for key in sections[section]:
            if not isinstance(key, str) or (section != "deepspeed" and key not in fields_of(section)):
                raise _unknown(f"{section}.{key}", at)
            origins[f"{section}.{key}"] = at
    return sections


def _override(sections: dict[str, Any], text: str, origins: dict[str, str]) -> None:
    """Puts one "--section.key=VALUE" of the command line in its place."""
    key, equals, value_text = text.strip().removeprefix("--").partition("=")
    if not equals and "." not in key and key not in (*SECTIONS, *PLAIN):
        if text.startswith("--") and (key in ALSO_CALLED or any(one.endswith(f".{key}") for one in known_keys())):
            raise _unknown(key, COMMAND_LINE)
        raise ConfigError(f"unknown argument {text!r} {COMMAND_LINE}: neither a flag of this command nor --KEY=VALUE")
    if not equals:
        raise ConfigError(f"{text!r} {COMMAND_LINE} has no value: write --{key}=VALUE")
    # A glob such as *.txt is an alias in YAML.
    value = value_text if value_text.startswith("*") else parse_yaml(value_text, f"{key} {COMMAND_LINE}")
    section, *names = key.split(".")
    if not names and section in (*SECTIONS, *PLAIN):
        added = _admit({section: value}, COMMAND_LINE, origins)[section]
        whole = section == "deepspeed" or section in PLAIN
        sections[section] = added if whole else {**sections.get(section, {}), **added}
        return
    goes_deep = section == "deepspeed" or key.startswith(("data.train.", "data.valid.", "data.fields."))
    known = section in SECTIONS and bool(names) and (section == "deepspeed" or names[0] in fields_of(section))
    if not known or (names[1:] and not goes_deep):
        raise _unknown(key, COMMAND_LINE)
    target = sections.setdefault(section, {})
    for depth, name in enumerate(names[:-1], start=1):
        if target.get(name) is None:
            target[name] = {}
        if not isinstance(target[name], dict):
            above = ".".join((section, *names[:depth]))
            at = f"{above} = {target[name]!r} ({origin_of(above, origins)})"
            raise ConfigError(f"{key} {COMMAND_LINE}: {at} is not a mapping")
        target = target[name]
    target[names[-1]] = value
    origins[key] = COMMAND_LINE


def _unknown(key: str, origin: str) -> ConfigError:
    """The error for a key that does not exist, with the nearest one that does, in its own section or another."""
    if key in RENAMED:
        change = {f"--{key}": f"--{RENAMED[key]}"}
        return ConfigError(f"unknown key {key} ({origin}): it is called {RENAMED[key]} now", change=change)
    section, _, name = key.rpartition(".")
    keys = known_keys()
    nearest = [known for known in keys if known.rpartition(".")[2] == name]
    if name in ALSO_CALLED and not nearest:
        nearest = [ALSO_CALLED[name]]
    if section in keys and not section.startswith("deepspeed."):  # a key below a plain value
        nearest = [section]

    def likeness(known: str) -> float:
        known_section, _, known_name = known.rpartition(".")
        ratio = difflib.SequenceMatcher(None, name, known_name).ratio()
        return ratio + 0.2 * (known_section == section) if ratio > 0.6 else 0.0

    if not nearest:
        best = max([*SECTIONS, *keys], key=likeness)
        nearest = [best] if likeness(best) else []
    if nearest:
        change = {f"--{key}": f"--{nearest[0]}"}
        return ConfigError(f"unknown key {key} ({origin}): did you mean {' or '.join(nearest)}?", change=change)
    valid = [known.rpartition(".")[2] for known in keys if section and known.rpartition(".")[0] == section]
    return ConfigError(f"unknown key {key} ({origin}): valid are {', '.join(valid or SECTIONS)}")


def _wrong_value(
    error: ErrorDetails, kind: type[Section], above: tuple[str, ...], origin: str, origins: dict[str, str]
) -> ConfigError:
    """The first complaint of pydantic as one line: key, value, where it came from, what would be right.

    `kind` is the class that was validated, `above` the names that lead to it.
    """
    names = [*above, *(str(name) for name in error["loc"])]
    in_source = names[:2] in (["data", "train"], ["data", "valid"])
    if names[:2] == ["data", "valid"]:
        del names[2:3]  # the member of a union: sources or a share
    names = names[:4] if in_source else names[:2]  # below are the members of unions and lists
    key, at = ".".join(names), origin_of(".".join(names), origins)
    of = Source if len(names) > 3 else kind if above or len(names) == 1 else section_type(names[0])
    fields: dict[str, Any] = of.model_fields
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(names[-1], fields, n=1, cutoff=0.0)[0]
        return ConfigError(f"unknown key {key} ({at}): did you mean {'.'.join((*names[:-1], near))}?")
    field = fields[names[-1] if len(names) != 3 else names[1]]
    choices = get_args(field.annotation)
    right = next((text for text in field.metadata if isinstance(text, str)), f"one of {', '.join(map(str, choices))}")
    if "ctx" in error and "error" in error["ctx"]:
        right = str(error["ctx"]["error"])
    if error["type"] == "missing":
        return ConfigError(f"{key} is missing ({origin if len(names) < 3 else at}): it must be {right}")
    value = error["input"]
    words = [choice for choice in choices if isinstance(choice, str)]
    near_value = difflib.get_close_matches(value, words, n=1) if isinstance(value, str) else []
    hint = f"; did you mean {near_value[0]}?" if near_value else ""
    return ConfigError(f"{key} = {value!r} ({at}): must be {right}{hint}")


def _resolve(config: Config, source: str | Path | dict[str, Any], saved: bool) -> None:
    """Fills in what follows from other keys or from model.pretrained."""
    model, train = config.model, config.train
    if train.epochs is not None and "steps" not in train.model_fields_set:
        train.steps = None
    if config.optimizer.momentum is None and config.optimizer.name in MOMENTUM:
        config.optimizer.momentum = MOMENTUM[config.optimizer.name]
    if config.run.dir is None:
        config.run.dir = f"runs/{'run' if isinstance(source, dict) else Path(source).stem}"
    if model.pretrained is None:
        model.max_position_embeddings = model.max_position_embeddings or config.data.sequence_length
        model.num_heads = model.num_heads or 4
        return
    if "tokenizer" not in config.data.model_fields_set:
        config.data.tokenizer = model.pretrained
        config._origins["data.tokenizer"] = "from model.pretrained"
    elif config.data.tokenizer == "sentencepiece":
        at = config.at("data.tokenizer")
        message = f"{at} would train a new one, but {config.at('model.pretrained')} has its own: remove the key"
        raise NoMeaningError(message, ["data.tokenizer"], ["model.pretrained"])
    if saved:
        return
    path, at = Path(model.pretrained) / "config.json", config.at("model.pretrained")
    sizes = _pretrained_sizes(hub.folder(model.pretrained, at) / "config.json", at)
    others = [f"model.{key}" for key, size in sizes.items() if config.value(f"model.{key}") != size]
    if others := [key for key in others if key.partition(".")[2] in model.model_fields_set]:
        first = next((key for key in others if config.is_typed(key)), others[0])
        size = sizes[first.partition(".")[2]]
        message = f"{config.at(first)} contradicts {path}, where it is {size!r}: remove the key (or give null)"
        raise NoMeaningError(message, others, ["model.pretrained"])
    for key, size in sizes.items():
        setattr(model, key, size)
        config._origins[f"model.{key}"] = f"in {path}"


def _pretrained_sizes(path: Path, at: str) -> dict[str, Any]:
    """The keys of the model section that config.json of a Hugging Face model folder decides. Raises ModelError."""
    if not path.parent.is_dir():
        raise ModelError(
            f"{at}: no such folder; give the folder of a Hugging Face model, with its config.json, or OWNER/NAME of "
            "one on the Hugging Face Hub"
        )
    hub.refuse_adapter(path.parent, at)
    content = read_json(path, at, ModelError)
    sizes: dict[str, Any] = {}
    for key, names in SIZES.items():
        name = next((name for name in names if content.get(name) is not None), None)
        size = content[name] if name else None
        wanted = str if key == "family" else int
        if key in ("intermediate_size", "num_key_value_heads") and not isinstance(size, int):
            size = None  # some families have one per block; nothing here depends on it
        if size is None and key in NEEDED_SIZES:
            raise ModelError(f"{at}: {path} has none of {', '.join(names)}; is it the folder of a causal LM?")
        if size is not None and (not isinstance(size, wanted) or isinstance(size, bool) or size in ("", 0)):
            raise ModelError(f"{at}: {path} says {name} = {size!r}: must be {'text' if wanted is str else 'a number'}")
        sizes[key] = size
    return sizes


def to_dict(config: Config) -> dict[str, Any]:
    """Every key that has a meaning here, with its value, as plain data that `load` takes."""
    values = config.model_dump()
    for key, (other, values_with_meaning) in ONLY_WITH.items():
        if config.value(other) not in values_with_meaning:
            section, name = key.split(".")
            del values[section][name]
    return values


# The keys that matter in a first configuration.
STARTER = (
    *("model.family", "model.pretrained", "model.hidden_size", "model.num_layers", "model.num_heads"),
    *("data.train", "data.valid", "data.vocab_size", "data.sequence_length"),
    *("parallel.pipeline", "parallel.data", "objective.name", "objective.chunks"),
    *("train.steps", "train.micro_batch_size", "train.micro_batches_per_update", "train.learning_rate"),
    *("train.warmup_steps", "train.eval_every", "checkpoint.every"),
)


def starter(pretrained: str | None, data: Sequence[str], valid: Sequence[str] = ()) -> str:
    """A first configuration as YAML, with a comment on every key: of a new small model, or to fine-tune `pretrained`.

    `data` are files of training text, or globs, `valid` those of validation text. Raises ConfigError and ModelError
    like `load`.
    """
    train: dict[str, Any] = {"steps": 500, "micro_batches_per_update": 2, "warmup_steps": 20}
    given: dict[str, Any] = {"data": {"train": list(data) or ["text/*.txt"]}, "train": train}
    if pretrained is None:
        given["objective"] = {"chunks": 2}
    else:
        given["model"] = {"pretrained": pretrained}
        del train["warmup_steps"]
    known = to_dict(load(given))
    values: dict[str, Any] = {}
    for section, _, key in (key.partition(".") for key in STARTER):
        value = known[section].get(key)
        if value is not None and (pretrained is None or section != "model" or key == "pretrained"):
            values.setdefault(section, {})[key] = value
    values["data"] |= given["data"] | {"valid": list(valid) or {}}
    return _commented(values)


def to_yaml(config: Config) -> str:
    """`to_dict` as YAML that `load` takes; a comment on every key says what it means."""
    return _commented(to_dict(config))


def _commented(values: Mapping[str, Any]) -> str:
    lines = []
    for section, keys in values.items():
        if section in PLAIN:
            lines += _yaml_lines(section, keys, Config.model_fields[section].description)
            continue
        lines.append(f"{section}:" if keys else f"{section}: {{}}")
        for key, value in keys.items():
            about = fields_of(section)[key].description if section != "deepspeed" else None
            lines += [f"  {line}" for line in _yaml_lines(key, value, about)]
    return "\n".join(lines) + "\n"


def _yaml_lines(key: str, value: Any, about: str | None) -> list[str]:
    """One key as YAML, with its comment behind it, or before it where it takes several lines."""
    text = dump_yaml({key: value}).splitlines()
    if about and len(text) == 1:
        return [f"{text[0]}  # {about}"]
    return [f"# {about}", *text] if about else text

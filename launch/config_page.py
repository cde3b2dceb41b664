"""Prints docs/config.md, every key of a configuration: `python launch/config_page.py > docs/config.md`."""

import argparse
from textwrap import fill
from typing import Any, get_args

from lptransformer.config.deepspeed_keys import OURS, REFUSED, TABLES
from lptransformer.config.schema import ONLY_WITH, PLAIN, ROWS, SECTIONS, Config, fields_of
from lptransformer.config.text import dump_yaml
from lptransformer.methods.codecs import CODECS

START = """# Keys of a configuration\n
`python launch/config_page.py > docs/config.md` writes this page from `config/schema.py`; a test compares the two. Every
key can be typed as `--section.key=VALUE`; VALUE is YAML, `null` is "as if not given". `python -m lptransformer config
CONFIG` prints a run's values. `engine` has no section: `--engine=VALUE`. `head.*` and `border.codec` need heads beside
the model's own ([methods and heads](methods.md)); what else does not go together is said where it is typed."""
NAMED = {f"{section}.{key}": rows for section, (key, rows) in ROWS.items()} | {"border.codec": CODECS}


def row(name: str, field: Any) -> str:
    (section, _, key), default = name.rpartition("."), "" if field.is_required() else dump_yaml({"": field.default})
    by, rows = ROWS.get(section, ("", {}))
    taken = [row for row, one in rows.items() if key in one.options.model_fields]
    only, those = ONLY_WITH.get(name) or (f"{section}.{by}", taken if len(taken) < len(rows) else ())
    choices = ", ".join(map(str, NAMED.get(name) or get_args(field.annotation))) or "true or false"
    words = next((text for text in field.metadata if isinstance(text, str)), choices)
    about = field.description + (f"; only with `{only}` {', '.join(those)}" if those else "")
    return f"| `{name}` | {default.partition(':')[2].strip() or 'required'} | {words} | {about} |\n"


def page() -> str:
    parts = [START]
    for part in [*PLAIN, *SECTIONS[:-1]]:
        fields = Config.model_fields if part in PLAIN else fields_of(part)
        rows = [row(part, fields[part])] if part in PLAIN else [row(f"{part}.{key}", fields[key]) for key in fields]
        parts.append(f"## {part}\n\n| key | default | value | meaning |\n|---|---|---|---|\n{''.join(rows)[:-1]}")
    keys = [f"`{table}{key}`" for table, keys in TABLES.items() for key in keys if table + key not in OURS | REFUSED]
    taken = fill(f"Options of every stage's DeepSpeed engine, or a DeepSpeed JSON: {', '.join(keys)}.", 120)
    refused = fill("Refused, a key here says it: " + ", ".join(f"`{key}` ({own})" for key, own in OURS.items()), 120)
    return "\n\n".join([*parts, "## deepspeed", taken, refused + "."])


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    print(page())

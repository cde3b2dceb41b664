"""The structure that docs/design.md promises, read from the source."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lptransformer"
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")

PURE = {"errors", "config", "config_sections", "config_text", "config_checks", "deepspeed_keys"}
PURE |= {"objective", "cost", "partition", "gradients", "schedule", "run_folder", "launcher", "__main__"}
PURE |= {"flops", "halving", "sweep_file", "records", "comparison", "pareto", "documents", "result_tables", "plots"}
PURE |= {"simulate", "devices", "memory", "footprint", "step_time", "candidates", "plan", "plan_report"}
HEAVY = {"torch", "deepspeed", "transformers", "datasets", "safetensors", "sentencepiece", "matplotlib", "numpy"}
ALLOWED = {
    "deepspeed": {"world", "deepspeed_stage", "pipeline_baseline"},
    "transformers": {"family", "pieces", "tokenizer", "optimizer", "export"},
    "datasets": {"prepare", "token_set"},
    "sentencepiece": {"tokenizer"},
    "matplotlib": {"progress", "plots", "figures", "diagnosis", "trace_plot"},
}
WHOLE_CONFIGURATION = {"build", "train", "launcher", "run_folder", "__main__"}
WHOLE_CONFIGURATION |= {"sweep_file", "run_record", "plan", "dry_run", "auto_batch"}
WITHOUT_DEEPSPEED = {"evaluate", "export", "report", "sweep", "run_folder", "data", "stage", "checkpoint"}
WITHOUT_DEEPSPEED |= {"diagnosis"}


def imports(module: str, top_level_only: bool = False) -> set[str]:
    """Every module that is imported, dotted, anywhere in the source or only when the module itself is imported."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    found: set[str] = set()
    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if top_level_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        todo += ast.iter_child_nodes(node)
    return found


def own(module: str) -> set[str]:
    """The modules of this package that a module imports anywhere."""
    parts = [name.split(".") for name in imports(module)]
    return {part[1] for part in parts if part[0] == "lptransformer" and len(part) > 1 and part[1] in MODULES}


def floors() -> dict[str, int]:
    """The table of docs/design.md, section Floors."""
    text = (ROOT / "docs" / "design.md").read_text()
    section = text.split("## Floors")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (\d+) \| (.*?) \|$", section, re.M)
    return {name: int(floor) for floor, names in rows for name in re.findall(r"`([\w_]+)`", names)}


def test_every_module_is_on_a_floor_and_nothing_else_is() -> None:
    assert sorted(floors()) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_floors_below_its_own(module: str) -> None:
    table = floors()
    above = {other: table[other] for other in own(module) if table[other] >= table[module]}
    assert not above, f"{module} is on floor {table[module]} and imports {above}"


@pytest.mark.parametrize("module", sorted(PURE))
def test_modules_that_reject_bad_configuration_import_nothing_slow(module: str) -> None:
    heavy = {name.split(".")[0] for name in imports(module, top_level_only=True)} & HEAVY
    assert not heavy


def test_the_command_line_starts_without_anything_slow() -> None:
    code = f"import sys, lptransformer.__main__; print(sorted({HEAVY} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("library", sorted(ALLOWED))
def test_a_library_is_used_in_its_place_only(library: str) -> None:
    users = {module for module in MODULES if any(name.split(".")[0] == library for name in imports(module))}
    assert users <= ALLOWED[library]


def test_only_those_who_put_the_parts_together_see_the_whole_configuration() -> None:
    readers = {module for module in MODULES if "lptransformer.config.Config" in imports(module)}
    assert readers <= WHOLE_CONFIGURATION


@pytest.mark.parametrize("module", sorted(WITHOUT_DEEPSPEED))
def test_evaluation_and_export_never_reach_deepspeed(module: str) -> None:
    seen, todo = set(), [module]
    while todo:
        one = todo.pop()
        if one not in seen:
            seen.add(one)
            todo += own(one)
    assert not seen & ALLOWED["deepspeed"], f"{module} reaches {seen & ALLOWED['deepspeed']}"


def test_no_class_derives_deeper_than_one_level_over_module() -> None:
    classes: dict[str, list[str]] = {}
    for module in MODULES:
        for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
            if isinstance(node, ast.ClassDef):
                classes[node.name] = [ast.unparse(base) for base in node.bases]
    modules = {name for name, bases in classes.items() if "nn.Module" in bases}
    assert modules, "the search found no module class"
    assert not {name for name, bases in classes.items() if modules & set(bases)}


def test_no_room_of_odds_and_ends_and_none_too_large() -> None:
    assert not {"utils", "util", "common", "helpers", "misc"} & set(MODULES)
    sizes = {module: len((PACKAGE / f"{module}.py").read_text().splitlines()) for module in MODULES}
    assert not {module: lines for module, lines in sizes.items() if lines > 500}

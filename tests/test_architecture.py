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
FILES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
MODULES = sorted(name for name in FILES if not name.endswith("__init__"))
ENTRANCES = {"__main__", "__init__"}  # import anything, and only when it is needed

# What each package may import beside the leaves of the root and itself.
ALL = {"methods", "config", "models", "data", "run_folder", "engine", "training", "evaluation", "planning", "study"}
MAY_IMPORT: dict[str, set[str]] = {
    "root": set(),
    "methods": set(),
    "data": set(),
    "config": {"methods"},
    "models": {"config", "methods"},
    "run_folder": {"config", "methods"},
    "engine": {"models", "run_folder", "data", "config", "methods"},
    "planning": {"models", "run_folder", "data", "config", "methods"},
    "evaluation": {"models", "run_folder", "data", "methods"},
    "training": ALL - {"training", "evaluation", "study"},
    "study": ALL - {"study", "engine", "training"},
}
HEAVY = {"torch", "deepspeed", "transformers", "datasets", "safetensors", "sentencepiece", "matplotlib", "numpy"}
HEAVY |= {"huggingface_hub", "peft", "bitsandbytes"}
# Packages and modules that are imported before a configuration is accepted, or by those who only compare runs.
LIGHT = {"methods", "config", "root"} - {"processes"}
LIGHT_MODULES = {
    "run_folder.layout",
    "run_folder.lock",
    "training.launcher",
    "__main__",
    "planning.simulate",
    "planning.devices",
}
LIGHT_MODULES |= {"planning.step_time", "planning.candidates", "planning.plan", "planning.plan_report"}
LIGHT_MODULES |= {"study.sweep_file", "study.records", "study.comparison", "study.markdown_tables"}
LIGHT_MODULES |= {"study.result_tables", "study.plots"}
WHERE = {
    "deepspeed": {"engine"},
    "transformers": {"models", "data.tokenizer", "engine.optimizer", "evaluation.export"},
    "datasets": {"data"},
    "huggingface_hub": {"hub"},
    "peft": {"models.adapters"},
    "bitsandbytes": {"engine.optimizer", "engine.optimizer_state"},
    "sentencepiece": {"data.tokenizer"},
    "matplotlib": {"figures", "run_folder.loss_plot", "study", "evaluation.diagnosis"},
}
WHOLE_CONFIGURATION = {"__main__", "__init__", "models.blueprint", "run_folder.layout"}
WHOLE_CONFIGURATION |= {"study.sweep_file", "study.collect"}
WHOLE_CONFIGURATION |= {name for name in MODULES if name.startswith(("planning.", "training.", "config."))}
WITHOUT_DEEPSPEED = {"evaluation", "study", "run_folder", "data", "models", "planning", "config", "methods"}


def package(module: str) -> str:
    head, dot, _ = module.partition(".")
    return head if dot else "root"


def imports(module: str, top_level_only: bool = False) -> set[str]:
    """Every module that is imported, dotted, anywhere in the source or only when the module itself is imported."""
    found: set[str] = set()
    todo: list[ast.AST] = [ast.parse(FILES[module].read_text())]
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
    """The modules of this program that a module imports anywhere."""
    names = {name.removeprefix("lptransformer.") for name in imports(module) if name.startswith("lptransformer.")}
    return {part for name in names for part in (name, name.rpartition(".")[0]) if part in MODULES}


def design_table() -> dict[str, set[str]]:
    """The packages and modules in the table of docs/design.md, section The house."""
    section = (ROOT / "docs" / "design.md").read_text().split("## The house")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `?(\w+)/?`? \|.*?\| (.*?) \|$", section, re.M)
    return {name: set(re.findall(r"`([\w_]+)`", modules)) for name, modules in rows if name != "package"}


def test_the_table_of_the_design_has_every_module_and_nothing_else() -> None:
    found: dict[str, set[str]] = {}
    for module in MODULES:
        found.setdefault(package(module), set()).add(module.rpartition(".")[2])
    assert design_table() == found


def test_every_package_says_what_lives_there() -> None:
    assert set(MAY_IMPORT) == {package(module) for module in MODULES}
    for name in sorted(ALL):
        text = FILES[f"{name}.__init__"].read_text()
        assert ast.get_docstring(ast.parse(text)), name
        assert not imports(f"{name}.__init__"), f"{name}/__init__.py imports something"


@pytest.mark.parametrize("module", [name for name in MODULES if name not in ENTRANCES])
def test_a_module_imports_only_what_its_package_may(module: str) -> None:
    here = package(module)
    wrong = {other for other in own(module) if package(other) not in {here, "root", *MAY_IMPORT[here]}}
    assert not wrong, f"{module} imports {wrong}"
    assert not own(module) & ENTRANCES or module == "training.launcher"


def test_no_imports_in_a_circle() -> None:
    def reached(module: str) -> set[str]:
        seen: set[str] = set()
        todo = list(own(module))
        while todo:
            one = todo.pop()
            if one not in seen:
                seen.add(one)
                todo += own(one)
        return seen

    assert not [module for module in MODULES if module in reached(module)]


LIGHT_ONES = [name for name in MODULES if package(name) in ("methods", "config") or name in LIGHT_MODULES]


@pytest.mark.parametrize("module", [*LIGHT_ONES, "errors", "section", "files", "console", "figures", "hub"])
def test_modules_that_reject_bad_configuration_import_nothing_slow(module: str) -> None:
    heavy = {name.split(".")[0] for name in imports(module, top_level_only=True)} & HEAVY
    assert not heavy


def test_methods_know_no_torch_at_all() -> None:
    for module in MODULES:
        if package(module) == "methods":
            assert not {name.split(".")[0] for name in imports(module)} & HEAVY, module


def test_the_command_line_starts_without_anything_slow() -> None:
    code = f"import sys, lptransformer.__main__; print(sorted({HEAVY} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("library", sorted(WHERE))
def test_a_library_is_used_in_its_place_only(library: str) -> None:
    users = {module for module in MODULES if any(name.split(".")[0] == library for name in imports(module))}
    assert not {module for module in users if not {module, package(module)} & WHERE[library]}


def test_only_those_who_put_the_parts_together_see_the_whole_configuration() -> None:
    readers = {module for module in MODULES if "lptransformer.config.schema.Config" in imports(module)}
    assert readers <= WHOLE_CONFIGURATION


def test_only_the_engine_reaches_deepspeed() -> None:
    for module in MODULES:
        if package(module) in WITHOUT_DEEPSPEED:
            seen: set[str] = set()
            todo = [module]
            while todo:
                one = todo.pop()
                if one not in seen:
                    seen.add(one)
                    todo += own(one)
            assert not {one for one in seen if package(one) == "engine"}, module


METHOD_NAMES = re.compile(r"[\"'](backprop|chunked|greedy|overlapping|deep_supervision|delayed|low_rank|shared)[\"']")


def test_no_module_asks_for_a_method_or_a_head_by_name() -> None:
    """What follows from a method or a head is derived from its row."""
    for module in MODULES:
        if module not in ("methods.objectives", "methods.heads"):
            asked = [line for line in FILES[module].read_text().splitlines() if METHOD_NAMES.search(line)]
            assert not [line for line in asked if re.search(r"==|!=| in \(|\.get\(", line)], module


def test_no_class_derives_deeper_than_one_level_over_module() -> None:
    classes: dict[str, list[str]] = {}
    for module in MODULES:
        for node in ast.walk(ast.parse(FILES[module].read_text())):
            if isinstance(node, ast.ClassDef):
                classes[node.name] = [ast.unparse(base) for base in node.bases]
    modules = {name for name, bases in classes.items() if "nn.Module" in bases}
    assert modules, "the search found no module class"
    assert not {name for name, bases in classes.items() if modules & set(bases)}


def test_no_room_of_odds_and_ends() -> None:
    assert not {"utils", "util", "common", "helpers", "misc"} & {module.rpartition(".")[2] for module in MODULES}
    for name in sorted(ALL):
        assert len([module for module in MODULES if package(module) == name]) <= 14, name


# ---------------------------------------------------------------------------------------------------- the documents

DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/**/*.md")]
NAME = re.compile(rf"`({'|'.join(sorted(ALL))})/(\w+)\.?([\w.]*)`")
PATH = re.compile(r"(?<![\w/.-])((?:tests|benchmarks|launch|configs|lptransformer)/[\w./-]*\w)(?![\w*{/-])")


def names_in(module: str) -> set[str]:
    """What a module defines, and below its classes what those do: `build`, `Stage`, `Stage.forward`."""
    found: set[str] = set()
    todo = [("", node) for node in ast.parse(FILES[module].read_text()).body]
    while todo:
        prefix, node = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(f"{prefix}{node.name}")
        if isinstance(node, ast.ClassDef) and not prefix:
            todo += [(f"{node.name}.", inner) for inner in node.body]
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        found |= {f"{prefix}{target.id}" for target in targets if isinstance(target, ast.Name)}
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_document_names_is_there(document: Path) -> None:
    """`package/module.name` in backticks, and paths from the top of the checkout."""
    text = document.read_text()
    for folder, module, name in NAME.findall(text):
        if not (PACKAGE / folder / f"{module}.{name}").exists():  # a module and what is in it, or a file by its name
            assert f"{folder}.{module}" in FILES, f"{folder}/{module}"
            assert not name or name in names_in(f"{folder}.{module}"), f"{folder}/{module}.{name}"
    for path in PATH.findall(text):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_pictures_of_a_document_are_there_as_png(document: Path) -> None:
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", document.read_text())
    local = [document.parent / picture for picture in pictures if "://" not in picture]
    assert all(picture.suffix == ".png" and picture.is_file() for picture in local), local


def test_no_svg_is_kept() -> None:
    assert not list((ROOT / "docs").rglob("*.svg"))

"""The package as it is installed from a wheel, outside of the checkout."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import small_run
import yaml

from lptransformer.run_folder.metrics_log import read_metrics

ROOT = Path(__file__).parents[1]


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a wheel puts into site-packages."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    shutil.copytree(ROOT / "lptransformer", source / "lptransformer")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", str(folder)]
    subprocess.run([*build, str(source)], check=True)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "installed")
    return folder / "installed"


def test_a_wheel_has_all_that_plan_needs(installed: Path, tmp_path: Path) -> None:
    config = shutil.copy(ROOT / "configs" / "quickstart.yaml", tmp_path / "q.yaml")
    run = "runpy.run_module('lptransformer', run_name='__main__')"
    code = f"import lptransformer, runpy; print(lptransformer.__file__); {run}"
    arguments = [sys.executable, "-c", code, "plan", str(config), "--vocab-size=512"]
    environment = {"PYTHONPATH": str(installed), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(str(installed)) and "- Use " in done.stdout


def test_its_types_are_known(installed: Path) -> None:
    assert (installed / "lptransformer" / "py.typed").is_file()


def test_its_console_script_is_the_command_line(installed: Path) -> None:
    (entry_points,) = installed.glob("*.dist-info/entry_points.txt")
    assert "lptransformer = lptransformer.__main__:main" in entry_points.read_text()


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_launchers_start_its_module_without_the_repository(installed: Path, tmp_path: Path, launcher: str) -> None:
    (tmp_path / "text.txt").write_text(small_run.TEXT)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({**small_run.CONFIG, "parallel": {"pipeline": 2}}))
    module, programs = "lptransformer.training.launcher", Path(sys.executable).parent
    command = {
        "deepspeed": ["--num_gpus", "2", "--master_port", "29879", "--module", module],
        "torchrun": ["--nproc-per-node", "2", "--master-port", "29879", "-m", module],
    }[launcher]
    environment = {"PYTHONPATH": str(installed), "PATH": f"{programs}:/usr/bin:/bin", "HOME": str(tmp_path)}
    environment |= {"OMP_NUM_THREADS": "1"}
    program = [str(programs / launcher), *command, "c.yaml"]
    done = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len([row for row in read_metrics(tmp_path / "run") if "stages" in row]) == 2

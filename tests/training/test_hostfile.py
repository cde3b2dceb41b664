"""Starting on several hosts, without hosts: the file, the placement, what is handed on, the scripts with stand-ins."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from lptransformer.config.load import load
from lptransformer.errors import UserError
from lptransformer.training import hosts
from lptransformer.training.hosts import handed_on, placement, read_hostfile
from lptransformer.training.launcher import decode, encode

ROOT = Path(__file__).parents[2]


def test_a_hosts_file_is_deepspeed_s(tmp_path: Path) -> None:
    (tmp_path / "h").write_text("# two nodes\n\nnode-0 slots=2\nnode-1   slots=4  # the large one\n")
    assert read_hostfile(str(tmp_path / "h")) == {"node-0": 2, "node-1": 4}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("node-0\n", "line 1: 'node-0' must be a host and `slots=N`"),
        ("a slots=1\nb slots=0\n", "line 2: 'b slots=0' must be"),
        ("a slots=1\na slots=2\n", "line 2: a is there twice"),
        ("# nothing\n", "no host in it"),
        (None, "cannot be read: No such file or directory"),
    ],
)
def test_a_wrong_one_is_refused_with_its_line(tmp_path: Path, text: str | None, says: str) -> None:
    if text is not None:
        (tmp_path / "h").write_text(text)
    with pytest.raises(UserError) as caught:
        read_hostfile(str(tmp_path / "h"))
    assert str(caught.value).startswith(f"--hostfile={tmp_path / 'h'}") and says in str(caught.value)


def test_replicas_of_a_rank_stay_together_where_the_numbers_allow_it() -> None:
    assert placement({"a": 2, "b": 2}, 2, 2) == ["a: pipeline rank 0", "b: pipeline rank 1"]
    assert placement({"a": 2, "b": 2}, 4, 1) == [
        "a: pipeline rank 0, pipeline rank 1",
        "b: pipeline rank 2, pipeline rank 3",
    ]
    assert placement({"a": 3, "b": 1}, 2, 2) == [
        "a: pipeline rank 0, pipeline rank 1 (replicas 0)",
        "b: pipeline rank 1 (replicas 1)",
    ]
    with pytest.raises(UserError, match=r"3 slots \(a 2, b 1\), but parallel.pipeline = 2 x parallel.data = 2 needs 4"):
        placement({"a": 2, "b": 1}, 2, 2)


def test_variables_are_handed_on_but_no_secret(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hosts.Path, "home", lambda: tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".deepspeed_env").write_text("NCCL_DEBUG=WARN\nOMP_NUM_THREADS=7\nMY_TOKEN=abc\n")
    for name in ("GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS", "HF_HOME", "HF_TOKEN", "PATH", "EDITOR", "HF_API_KEY"):
        monkeypatch.setenv(name, "here")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    found = handed_on({"a": 1, "b": 1})
    assert found["GLOO_SOCKET_IFNAME"] == found["HF_HOME"] == found["PATH"] == "here"
    assert found["OMP_NUM_THREADS"] == "7" and found["NCCL_DEBUG"] == "WARN", "the user's own file wins"
    assert found["LPTRANSFORMER_HOSTS"] == "a,b" and "LPTRANSFORMER_COMMAND" in found
    assert found["LPTRANSFORMER_VISIBLE_DEVICES"] == "2,3"
    assert not {"HF_TOKEN", "MY_TOKEN", "HF_API_KEY", "EDITOR"} & set(found)


def test_what_is_typed_travels_as_one_word() -> None:
    typed = ["c d.yaml", "--deepspeed.zero_optimization={stage:1,overlap_comm:false}", "--run.dir=a 'b' $HOME %n"]
    word = encode(typed)
    assert decode(word) == typed and word.replace("-", "").replace("_", "").replace("=", "").isalnum()


def test_without_pdsh_the_other_way_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "h").write_text("a slots=1\nb slots=1\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    config = load({"data": {"train": "t.txt"}, "parallel": {"pipeline": 2}})
    with pytest.raises(UserError, match="pdsh is not installed here.*NODE_RANK=0 bash launch/multinode.sh"):
        hosts.launch_on_hosts(config, str(tmp_path / "h"), [])


def stand_in(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(f"#!/bin/bash\n{text}\n")
    (folder / name).chmod(0o755)


def test_slurm_starts_one_launcher_per_node(tmp_path: Path) -> None:
    """slurm.sbatch with stand-ins for scontrol, srun and the interpreter."""
    for name in ("launch", ".venv/bin", "bin", "configs"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("multinode.sh", "slurm.sbatch"):
        (tmp_path / "launch" / name).write_text((ROOT / "launch" / name).read_text())
    (tmp_path / "configs" / "c.yaml").write_text("")
    stand_in(tmp_path / "bin", "scontrol", 'echo "$@" > scontrol.txt; printf "n1\\nn2\\n"')
    stand_in(
        tmp_path / "bin",
        "srun",
        'while [[ "$1" == -* ]]; do echo "$1" >> srun.txt; shift; done\n'
        'for id in 0 1; do SLURM_NODEID=$id "$@" || exit; done',
    )
    words = 'echo "$LPTRANSFORMER_HOSTS $LPTRANSFORMER_VISIBLE_DEVICES $@" >> python.txt'
    stand_in(tmp_path / ".venv/bin", "python", words)
    variables = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_GPUS_ON_NODE": "2"}
    variables |= {"SLURM_JOB_ID": "41234", "SLURM_CPUS_PER_TASK": "8", "CUDA_VISIBLE_DEVICES": "4,5"}
    environment = {"PATH": f"{tmp_path / 'bin'}{os.pathsep}/usr/bin:/bin", **variables}
    command = ["bash", "launch/slurm.sbatch", "configs/c.yaml", "--train.steps=5"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "scontrol.txt").read_text() == "show hostnames n[1-2]\n"
    assert (tmp_path / "srun.txt").read_text().split() == ["--kill-on-bad-exit=1", "--cpus-per-task=8"]
    first, second = (tmp_path / "python.txt").read_text().splitlines()
    for rank, line in enumerate((first, second)):
        assert line.startswith("n1,n2 4,5 -m deepspeed.launcher.runner")
        for part in (f"--node_rank={rank}", "--master_addr=n1", "--master_port=21234", "--no_ssh", "--train.steps=5"):
            assert part in line
    assert not list(tmp_path.glob("hostfile.*")), "the hosts file goes with the job"


def test_one_command_or_this_node_alone(tmp_path: Path) -> None:
    """multinode.sh without NODE_RANK is `train --hostfile`."""
    (tmp_path / "launch").mkdir()
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / "launch" / "multinode.sh").write_text((ROOT / "launch" / "multinode.sh").read_text())
    stand_in(tmp_path / ".venv/bin", "python", 'echo "$@"')
    for name in ("h", "c.yaml"):
        (tmp_path / name).write_text("n1 slots=1\n")
    command = ["bash", "launch/multinode.sh", "h", "c.yaml", "--resume"]
    done = subprocess.run(command, cwd=tmp_path, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True)
    assert done.stdout.split() == [
        *("-m", "lptransformer", "train", str(tmp_path / "c.yaml"), "--hostfile", str(tmp_path / "h"), "--resume")
    ]
    missing = subprocess.run(
        ["bash", "launch/multinode.sh", "no", "c.yaml"], cwd=tmp_path, capture_output=True, text=True
    )
    assert missing.returncode == 2 and "the hostfile 'no' does not exist" in missing.stderr


@pytest.mark.parametrize("value", ["plain", '["a b", "$HOME"]', "`x` \\ 'y'", 'back\\"slash'])
def test_a_value_comes_through_the_shell_of_another_host(value: str) -> None:
    shell = f'export X="{hosts.in_quotes(value)}"; printf %s "$X"'
    assert subprocess.run(["sh", "-c", shell], capture_output=True, text=True).stdout == value

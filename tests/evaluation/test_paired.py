"""Two models on the same text: their difference by pieces, against a loop that knows nothing of the package."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from saved_runs import TEXT, WINDOW, make_run, write_text
from transformers import AutoModelForCausalLM, AutoTokenizer

from lptransformer.__main__ import parser
from lptransformer.data.readers import Source
from lptransformer.data.tokenizer import load as load_tokenizer
from lptransformer.errors import DataError, RunError, UserError
from lptransformer.evaluation import protocols
from lptransformer.evaluation.export import export_run
from lptransformer.evaluation.paired import difference, piece_nats
from lptransformer.evaluation.perplexity import evaluate_run
from lptransformer.evaluation.protocols import PROTOCOLS, Options, detokenised
from lptransformer.training.launcher import run as run_command

PIECE = 64
DOCUMENTS = [
    " = Moor = \n\n The wind 's voice ( low ) w\u00e4s its own @-@ made . \n",
    TEXT[:400],
    "Short .",
    TEXT[90:230],
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run with a vocabulary of pieces and two exits, and the folder of another model whose tokens are bytes."""
    folder = tmp_path_factory.mktemp("models")
    run = make_run(folder / "a", model={"family": "llama"}, tokenizer="sentencepiece", valid={"moor": TEXT})
    export_run(make_run(folder / "b"), folder / "bytes", keep_exits=True)
    export_run(run, folder / "pieces")
    return run, folder / "bytes"


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(protocols, "PIECE_BYTES", PIECE)
    lines = (json.dumps({"text": one}) + "\n" for one in DOCUMENTS)
    return write_text(tmp_path / "moor.jsonl", "".join(lines))


def compared(run: Path, base: Path, text: Path, **options: Any) -> dict[str, Any]:
    results = evaluate_run(run, [str(text)], compare=base, **options)
    assert results is not None
    return results


# ---- by hand


def losses(opened: Any, ids: list[int], scored: int) -> list[float]:
    """Of the last `scored` ids, in fp64."""
    with torch.no_grad():
        logits = opened(torch.tensor([ids[:-1]])).logits[0]
    found = F.cross_entropy(logits.double(), torch.tensor(ids[1:]), reduction="none").tolist()
    return found[len(found) - scored :]


def tokens(tokenizer: Any, text: str) -> list[tuple[int, int]]:
    """The ids of a text and the byte at which each begins, from how long the tokens are that spell it."""
    found, begin = [], 0
    for index in tokenizer(text, add_special_tokens=False).input_ids:
        token = tokenizer.convert_ids_to_tokens(index)
        plain = len(token) == 1 or re.fullmatch("<0x..>", token)  # a token of the vocabulary of bytes is one character
        found.append((index, begin))
        begin += 1 if plain else len(token.replace("\u2581", " ").encode())
    assert begin == len(text.encode())
    return found


def by_hand(folder: Path, protocol: str) -> tuple[dict[tuple[int, int], float], list[float]]:
    """Nats by (document, piece), in which a token that is not scored counts with the mean; those of scored tokens."""
    opened, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    places: list[tuple[int, int]] = []  # of every token
    nats: list[float | None] = []
    if protocol == "lm-eval-wikitext":
        for number, document in enumerate(DOCUMENTS):
            found = tokens(tokenizer, detokenised(document))
            bos = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
            whole = [bos, *(index for index, _ in found)]
            for done in range(0, len(found), WINDOW):
                last = min(done + WINDOW, len(found))
                nats += losses(opened, whole[max(0, last - WINDOW) : last + 1], last - done)
            places += [(number, begin // PIECE) for _, begin in found]
    elif protocol == "blocks":
        ids: list[int] = []
        for number, document in enumerate(DOCUMENTS):
            if number:  # the end of a document belongs to it
                ids.append(tokenizer.eos_token_id)
                places.append((number - 1, (len(DOCUMENTS[number - 1].encode()) - 1) // PIECE))
            found = tokens(tokenizer, document)
            ids += [index for index, _ in found]
            places += [(number, begin // PIECE) for _, begin in found]
        for start in range(0, len(ids), WINDOW):
            window = ids[start : start + WINDOW]
            nats += [None, *(losses(opened, window, len(window) - 1) if len(window) > 1 else [])]
    else:
        found = tokens(tokenizer, "\n\n".join(DOCUMENTS))
        ids, before = [index for index, _ in found], 0
        edges = np.cumsum([0, *(len(one.encode()) + 2 for one in DOCUMENTS[:-1])])
        for _, begin in found:
            number = max(i for i in range(len(edges)) if edges[i] <= begin)
            places.append((number, int(begin - edges[number]) // PIECE))
        for start in range(0, len(ids), WINDOW // 2):
            end = min(start + WINDOW, len(ids))
            new = end - before
            nats += [None] * (start == 0) + losses(opened, ids[start:end], new - (start == 0))
            before = end
            if end == len(ids):
                break
    scored = [one for one in nats if one is not None]
    sums: dict[tuple[int, int], float] = {}
    for place, one in zip(places, nats, strict=True):
        sums[place] = sums.get(place, 0.0) + (sum(scored) / len(scored) if one is None else one)
    return sums, scored


def sizes_by_hand(protocol: str) -> list[float]:
    """The bytes of every piece."""
    found: list[float] = []
    for number, document in enumerate(DOCUMENTS):
        seen, own = document, len(document.encode())
        if protocol == "lm-eval-wikitext":
            seen = detokenised(document)
        elif protocol == "hf-sliding" and number < len(DOCUMENTS) - 1:
            seen, own = document + "\n\n", own + 2
        size = len(seen.encode())
        found += [min(PIECE, size - start) * own / size for start in range(0, size, PIECE)]
    return found


@pytest.mark.parametrize("protocol", ["blocks", "hf-sliding", "lm-eval-wikitext"])
def test_the_difference_is_that_of_a_plain_loop(models: tuple[Path, Path], text: Path, protocol: str) -> None:
    run, base = models
    results = compared(run, base, text, protocol=protocol, window=WINDOW)
    sizes = np.array(sizes_by_hand(protocol))
    (own, scored), (of_base, base_scored) = (by_hand(one, protocol) for one in (run.parents[1] / "pieces", base))
    assert len(own) == len(of_base) == len(sizes) and len(scored) != len(base_scored)
    bits = np.array([(own[place] - of_base[place]) / math.log(2) for place in sorted(own)])
    generator, drawn = np.random.default_rng(0), []
    for _ in range(2000):
        chosen = generator.integers(len(bits), size=len(bits))
        drawn.append(sum(bits[i] for i in chosen) / sum(sizes[i] for i in chosen))

    found = results["comparison"]
    assert (found["pieces"], found["piece_bytes"], found["seed"]) == (len(sizes), PIECE, 0)
    last = found["differences"][-1]
    assert [one["last_block"] for one in found["differences"]] == [1, 3] == [e["last_block"] for e in results["exits"]]
    assert last["bits_per_byte"] == pytest.approx(bits.sum() / sizes.sum(), rel=1e-5)
    assert [last["low"], last["high"]] == pytest.approx(np.percentile(drawn, (2.5, 97.5)).tolist(), rel=1e-5)
    assert last["low"] < last["bits_per_byte"] < last["high"]
    # Both are printed too, as they are by themselves; the difference is theirs.
    (of_other,) = found["base"]["exits"]
    assert (results["exits"][-1]["tokens"], of_other["tokens"]) == (len(scored), len(base_scored))
    assert results["exits"] == evaluate_run(run, [str(text)], protocol=protocol, window=WINDOW)["exits"]  # type: ignore[index]
    assert last["bits_per_byte"] == pytest.approx(results["exits"][-1]["bits_per_byte"] - of_other["bits_per_byte"])


@pytest.mark.parametrize("protocol", ["blocks", "hf-sliding", "lm-eval-wikitext"])
@pytest.mark.parametrize("which", [0, 1])
def test_the_pieces_are_the_whole_text(models: tuple[Path, Path], text: Path, protocol: str, which: int) -> None:
    """Every token of the text is in one; bits per byte are the mean of the pieces, weighed by their bytes."""
    tokenizer = load_tokenizer((models[0] / "tokenizer", models[1])[which])
    scoring = PROTOCOLS[protocol].score(
        Source("moor", (text,)), tokenizer, Options(8, 5, which == 0 and protocol == "blocks", pieces=True)
    )
    assert scoring.pieces is not None and scoring.counts.bytes == sum(scoring.pieces.bytes)
    assert (scoring.pieces.of_id >= 0).sum() == scoring.counts.tokens
    nlls = np.random.default_rng(1).random(scoring.tokens, dtype=np.float32)
    whole = nlls.mean(dtype=np.float64) * scoring.counts.tokens
    assert piece_nats(scoring, nlls).sum() == pytest.approx(whole, rel=1e-14)


def test_a_model_is_not_different_from_itself(models: tuple[Path, Path], text: Path) -> None:
    for model in models:
        last = compared(model, model, text)["comparison"]["differences"][-1]
        assert (last["bits_per_byte"], last["low"], last["high"]) == (0.0, 0.0, 0.0)
    older = compared(models[1], models[1], text, exit_block=1)["comparison"]  # an exit with the last one
    assert len(older["differences"]) == 1 and older["differences"][0]["bits_per_byte"] != 0.0


def test_the_smaller_window_is_that_of_both(tmp_path: Path, models: tuple[Path, Path], text: Path) -> None:
    base = tmp_path / "short"
    shutil.copytree(models[0].parents[1] / "pieces", base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8}))
    assert compared(models[1], base, text)["window"] == 8
    with pytest.raises(UserError, match="--window 16: the model takes 8 tokens at most"):
        compared(models[1], base, text, window=16)


def test_whole_pieces_are_drawn_and_one_has_no_interval() -> None:
    one = difference(np.array([math.log(2) * 6]), np.array([math.log(2) * 2]), np.array([8.0]))
    assert (one.bits_per_byte, one.low, one.high) == (pytest.approx(0.5), None, None)
    # Of two pieces, one a hundred times as long, a resample has both or one of them twice.
    nats, sizes = np.array([math.log(2) * 100, 0.0]), np.array([100.0, 1.0])
    two = difference(nats, np.zeros(2), sizes)
    assert (two.bits_per_byte, two.low, two.high) == (pytest.approx(100 / 101), 0.0, pytest.approx(1.0))


# ---- the command, and what is refused


def test_the_command_prints_both_and_the_difference(
    models: tuple[Path, Path], text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, base = models
    run_command(parser(), ["evaluate", str(run), "--data", str(text), "--compare", str(base)])
    out = capsys.readouterr().out
    run_command(parser(), ["evaluate", str(run), "--data", str(text), "--compare", str(base), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found == compared(run, base, text)
    assert out.count("bits per byte  byte perplexity") == 2 and f"moor, {base} (blocks: window 16" in out
    last = found["comparison"]["differences"][-1]
    assert f"paired over {found['comparison']['pieces']} pieces" in out and "2000 resamples, seed 0" in out
    row = [f"{last[key]:+.5f}" for key in ("bits_per_byte", "low", "high")]
    assert out.splitlines()[-1].split() == ["3", *row]


def test_the_run_s_own_sets_are_read_as_text(models: tuple[Path, Path]) -> None:
    results = evaluate_run(models[0], compare=models[1])
    assert results is not None and results["comparison"]["pieces"] == 1 and results["set"] == "moor"
    assert results["comparison"]["differences"][0]["low"] is None
    assert results["exits"] == evaluate_run(models[0])["exits"]  # type: ignore[index]


@pytest.mark.slow  # starts a process
def test_any_number_of_processes_gives_the_same(models: tuple[Path, Path], text: Path) -> None:
    one, two = (compared(*models, text, batch_size=3, processes=many) for many in (1, 2))
    assert one == two


def test_what_cannot_be_compared_is_said(
    models: tuple[Path, Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, base = models
    prepared = json.loads((run / "data.json").read_text())["valid"]["moor"]
    with pytest.raises(UserError, match="is a prepared set: models are compared on the bytes of a text"):
        compared(run, base, Path(prepared))
    with pytest.raises(RunError, match="nowhere is no run folder"):
        compared(run, tmp_path / "nowhere", text)
    blocks = PROTOCOLS["blocks"].score
    plain = protocols.Protocol(lambda *args: blocks(*args[:2], args[2]._replace(pieces=False)), "", bos=True)
    monkeypatch.setitem(PROTOCOLS, "plain", plain)
    with pytest.raises(UserError, match="--compare: --protocol plain does not say where in a text its tokens are"):
        compared(run, base, text, protocol="plain")
    monkeypatch.setattr("lptransformer.data.tokenizer.Tokenizer.knows_places", False)
    with pytest.raises(DataError, match="--compare: the tokenizer of .* takes a tokenizer.json"):
        compared(run, base, text)

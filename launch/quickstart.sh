#!/usr/bin/env bash
# From a fresh checkout to a perplexity: set up, prepare four novels, train on two pipeline ranks with local updates
# through the deepspeed launcher, evaluate on a novel that was held out, show the result. Arguments are overrides of
# configs/quickstart.yaml (but for run.dir), for example --train.steps=100.
set -euo pipefail
source "$(dirname "$0")/setup.sh"
run=runs/quickstart-$(date +%Y%m%d-%H%M%S)
.venv/bin/python -m lptransformer prepare configs/quickstart.yaml "$@"
.venv/bin/python -m lptransformer train configs/quickstart.yaml "$@" --run.dir="$run"
.venv/bin/python -m lptransformer report "$run" --baselines

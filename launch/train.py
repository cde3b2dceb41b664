"""What the launchers start: `deepspeed launch/train.py --config configs/quickstart.yaml --train.steps=20`."""

from lptransformer.training.launcher import main

main()

"""Pretrain: `python train.py [key=value ...]`, see configs/train.yaml."""

import sys

from msn.__main__ import run_named

if __name__ == "__main__":
    run_named("train", sys.argv[1:])

"""train.py that skips the final table and signals itself: DISTURB=rank:step:SIGNAL."""

import os
import signal
import sys

import torch
from lightning.pytorch import Callback

from msn.__main__ import run_named
from msn.commands import train


class Signal(Callback):
    def __init__(self, rank, step, number):
        self.rank, self.step, self.number = rank, step, number

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (trainer.global_rank, trainer.global_step) == (self.rank, self.step):
            os.kill(os.getpid(), self.number)


def finish(settings, directory, *rest):
    directory.write_status("finished")


def disturb(rank, step, name):
    attach = train._attach

    def attach_too(config, trainer, *rest):
        attach(config, trainer, *rest)
        trainer.callbacks.insert(0, Signal(int(rank), int(step), signal.Signals[name]))

    train._attach = attach_too


if __name__ == "__main__":
    torch.set_num_threads(1)
    train.finish = finish
    if "DISTURB" in os.environ:
        disturb(*os.environ["DISTURB"].split(":"))
    run_named("train", sys.argv[1:])

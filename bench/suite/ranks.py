"""The compute of one rank's training step in a run of two, without messages."""

import torch

import kernels

from ..subjects.cases import failure
from ..subjects.one_rank import ALONE_CASE, alone, usable
from .run import Rows, Run


def rows(run: Run) -> Rows:
    """A row for each strategy."""
    how = "eager" if run.scale.toy else "reduce-overhead"
    for strategy in usable(run.scale.network, 2):
        run.say(f"measuring a rank of {strategy}")
        torch._dynamo.reset()
        try:
            with kernels.implementation(run.scale.ours):
                row = alone(
                    strategy, run.scale.network, run.scale.images, 2, run.scale.dtype, how, run.device, run.samples
                )
        except Exception as error:  # Any error becomes the row's status, and the other strategies continue.
            row = {
                "suite": "parallel",
                "case": ALONE_CASE,
                "implementation": strategy,
                "network": run.scale.network,
                "status": failure(error),
            }
        yield row

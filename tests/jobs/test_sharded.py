"""A fused network on two processes, with parameters sharded (FSDP2) or replicated (DDP), trains as in one process."""

import pytest

from tests.jobs.test_parallel import torchrun


@pytest.mark.slow
def test_two_ranks_train_as_one() -> None:
    done = torchrun("sharded_worker.py")
    assert done.returncode == 0, done.stderr
    for line in ("-> relu_lrn_max_pool2d", "FSDP2: equal to one process", "DDP: equal to one process"):
        assert line in done.stdout

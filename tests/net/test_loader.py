"""Batches: which images, in what order, resuming, and that buffers are not overwritten too early."""

import itertools
import threading

import numpy as np
import pytest
import torch

from net.data import loader as module
from net.data.images import Split
from net.data.loader import Batch, Loader, cache_that_fits

CPU = torch.device("cpu")


def split(count: int, size: int = 4) -> Split:
    """Image ``n`` holds the byte ``n % 256`` everywhere."""
    images = np.broadcast_to(np.arange(count, dtype=np.int64)[:, None, None, None] % 256, (count, size, size, 3))
    return Split(images.astype(np.uint8), np.arange(count, dtype=np.int64) * 10)


def take(loader: Loader, count: int) -> list[Batch]:
    """Copies of the next batches."""
    batches = iter(loader)
    found = [
        Batch(batch.images.clone(), batch.labels.clone(), batch.samples.copy(), batch.epoch)
        for batch in itertools.islice(batches, count)
    ]
    batches.close()
    return found


def same(one: list[Batch], other: list[Batch]) -> bool:
    return all(
        torch.equal(a.images, b.images) and (a.samples == b.samples).all() and a.epoch == b.epoch
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("cache", ["none", "host", "device"])
@pytest.mark.parametrize("threads", [1, 3])
def test_images_and_labels_belong_to_the_samples(cache: module.Cache, threads: int) -> None:
    for batch in take(Loader(split(50), 8, CPU, shuffle=True, cache=cache, threads=threads), 14):
        assert batch.images.dtype == torch.uint8
        assert batch.images.shape == (8, 4, 4, 3)
        assert (batch.images == torch.from_numpy(batch.samples)[:, None, None, None] % 256).all()
        assert (batch.labels == torch.from_numpy(batch.samples) * 10).all()


def test_only_some_of_the_images() -> None:
    some = np.array([3, 7, 8, 20, 41])
    assert len(Loader(split(50), 2, CPU, shuffle=True, only=some)) == 5
    batches = take(Loader(split(50), 2, CPU, shuffle=True, only=some), 20)
    assert {int(sample) for batch in batches for sample in batch.samples} == set(some.tolist())
    (first, last) = take(Loader(split(50), 3, CPU, shuffle=False, only=some), 3)
    assert [first.samples.tolist(), last.samples.tolist()] == [[3, 7, 8], [20, 41]]
    assert last.images[:, 0, 0, 0].tolist() == [20, 41]
    assert last.labels.tolist() == [200, 410]
    # What a run has of all its images does not depend on whether some could have been left out.
    everything = take(Loader(split(50), 8, CPU, shuffle=True, seed=3, only=np.arange(50)), 12)
    assert same(everything, take(Loader(split(50), 8, CPU, shuffle=True, seed=3), 12))
    with pytest.raises(ValueError, match="batch_size 6 is more than the 5 training images"):
        Loader(split(50), 6, CPU, shuffle=True, only=some)


def test_an_epoch_shows_each_image_at_most_once_in_a_new_order() -> None:
    batches = take(Loader(split(50), 8, CPU, shuffle=True), 18)
    assert [batch.epoch for batch in batches] == [0] * 6 + [1] * 6 + [2] * 6
    epochs = [np.concatenate([batch.samples for batch in batches[first : first + 6]]) for first in (0, 6, 12)]
    for samples in epochs:
        assert len(set(samples)) == 48
    assert not (epochs[0] == epochs[1]).all()
    assert not (epochs[1] == epochs[2]).all()


def test_every_image_has_its_turn() -> None:
    seen = {sample for batch in take(Loader(split(50), 8, CPU, shuffle=True), 60) for sample in batch.samples}
    assert seen == set(range(50))


def test_the_seed_decides_the_order() -> None:
    one, same_seed, other = (take(Loader(split(50), 8, CPU, shuffle=True, seed=seed), 12) for seed in (1, 1, 2))
    assert same(one, same_seed)
    assert not same(one, other)


@pytest.mark.parametrize("cache", ["none", "device"])
@pytest.mark.parametrize("position", [0, 1, 5, 6, 7, 13])
def test_goes_on_from_any_position(position: int, cache: module.Cache) -> None:
    """The position counts batches returned, not batches read ahead."""
    whole = take(Loader(split(50), 8, CPU, shuffle=True, seed=3), 20)
    first = Loader(split(50), 8, CPU, shuffle=True, seed=3, cache=cache)
    batches = iter(first)
    for _ in range(position):
        next(batches)
    state = first.state_dict()
    batches.close()
    assert state == {"epoch": position // 6, "batch": position % 6}
    second = Loader(split(50), 8, CPU, shuffle=True, seed=3, cache=cache)
    second.load_state_dict(state)
    assert same(take(second, 20 - position), whole[position:])


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_each_batch(ranks: int) -> None:
    whole = take(Loader(split(50), 8, CPU, shuffle=True), 7)
    parts = [take(Loader(split(50), 8, CPU, shuffle=True, rank=rank, replicas=ranks), 7) for rank in range(ranks)]
    for step, batch in enumerate(whole):
        assert np.concatenate([part[step].samples for part in parts]).tolist() == batch.samples.tolist()


def test_one_pass_in_order_with_a_smaller_last_batch() -> None:
    loader = Loader(split(50), 8, CPU, shuffle=False)
    for _ in range(2):
        batches = take(loader, 99)
        assert [len(batch.labels) for batch in batches] == [8] * 6 + [2]
        assert np.concatenate([batch.samples for batch in batches]).tolist() == list(range(50))


def test_ranks_share_the_last_batch_of_a_pass() -> None:
    parts = [take(Loader(split(21), 8, CPU, shuffle=False, rank=rank, replicas=2), 99) for rank in range(2)]
    samples = [np.concatenate([part[step].samples for part in parts]).tolist() for step in range(3)]
    assert samples == [list(range(8)), list(range(8, 16)), list(range(16, 21))]


def test_a_batch_stays_until_the_next_is_asked_for() -> None:
    batches = iter(Loader(split(200), 8, CPU, shuffle=True))
    for batch in itertools.islice(batches, 25):
        # Long enough for the reading thread to fill every free buffer.
        threading.Event().wait(0.005)
        assert (batch.images[:, 0, 0, 0] == torch.from_numpy(batch.samples) % 256).all()
    batches.close()


def test_closing_ends_the_threads() -> None:
    before = threading.active_count()
    for threads in (1, 2):
        batches = iter(Loader(split(50), 8, CPU, shuffle=True, threads=threads))
        next(batches)
        assert threading.active_count() > before
        batches.close()
        assert threading.active_count() == before


def test_an_error_in_the_thread_reaches_the_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(Loader, "_read", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        take(Loader(split(50), 8, CPU, shuffle=True), 3)


def test_images_and_labels_must_be_as_many() -> None:
    with pytest.raises(ValueError, match="50 images and 49 labels"):
        Split(split(50).images, split(49).labels)
    with pytest.raises(ValueError, match="images must be uint8"):
        Split(split(50).images.astype(np.float32), split(50).labels)


def test_reads_a_mapped_file(tmp_path) -> None:  # type: ignore[no-untyped-def]
    np.save(tmp_path / "images.npy", split(50).images)
    mapped = Split(np.load(tmp_path / "images.npy", mmap_mode="r"), split(50).labels)
    assert same(
        take(Loader(mapped, 8, CPU, shuffle=True, cache="host"), 7), take(Loader(mapped, 8, CPU, shuffle=True), 7)
    )


@pytest.mark.parametrize(
    ("count", "options", "says"),
    [
        (5, {"shuffle": True}, "batch_size 8 is more than the 5 training images"),
        (50, {"shuffle": True, "replicas": 3}, "batch_size 8 cannot be shared by 3 ranks"),
    ],
)
def test_refusals(count: int, options: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Loader(split(count), 8, CPU, **options)  # type: ignore[arg-type]


def test_a_cache_that_does_not_fit_is_left_out_and_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cache_that_fits(split(50), "none", CPU) == "none"
    assert cache_that_fits(split(50), "host", CPU) == "host"
    assert cache_that_fits(split(50), "device", CPU) == "host"
    monkeypatch.setattr(module, "free_host_memory", lambda: 1000)
    assert cache_that_fits(split(50), "host", CPU) == "none"
    assert "--cache host: the images take" in capsys.readouterr().out

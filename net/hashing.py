"""Short binary codes for image search: ``python -m net.hashing CHECKPOINT``; ``--help`` lists the flags."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import pretrained
from .common import cli
from .common.errors import DataError, UsageError
from .common.fields import DEVICES, at_least, flag, flag_name
from .common.files import atomic_write, check_writable
from .training import runs

DESCRIPTION = (
    "The proposal of section 6.1: an auto-encoder compresses a network's last hidden features (fc7) to short binary "
    "codes, which are searched by Hamming distance. Reports the recall of the exact Euclidean neighbours, with random "
    "hyperplanes for comparison, and the speed of both searches on the CPU."
)
#: Recall is of the EXACT nearest neighbours, among each of these numbers of nearest codes.
EXACT = 10
LOOKED_AT = (10, 100)
#: Timings of each search, of which the fastest counts.
TIMINGS = 3
#: Training vectors per batch of the exact search.
_PART = 8192


@dataclass(frozen=True)
class HashingConfig:
    """The flags of ``python -m net.hashing``."""

    checkpoint: str = flag(
        "", "run folder, checkpoint (.pt), weights (.safetensors) or the name of pretrained weights", positional=True
    )
    data_path: str | None = flag(
        None, "as in net.train; by default the data the network was trained on", metavar="PATH"
    )
    bits: int = flag(64, "bits per code, a multiple of 64")
    epochs: int = flag(30, "epochs of training of the auto-encoder")
    queries: int = flag(1000, "number of validation images used as queries")
    seed: int = flag(0, "seed of the auto-encoder and of the choice of queries")
    batch_size: int = flag(128, "images per batch", short="b")
    device: str | None = flag(None, DEVICES)
    output: str | None = flag(None, "JSON file; hashing.json in the run folder by default", metavar="FILE")

    def __post_init__(self) -> None:
        at_least(self, 1, "bits", "epochs", "queries", "batch_size", called=flag_name)
        at_least(self, 0, "seed", called=flag_name)
        if self.bits % 64:
            raise UsageError(f"--bits must be a multiple of 64; got {self.bits}")


def _hash(config: HashingConfig) -> dict[str, Any]:
    """The measurements, in the form of the JSON file."""
    import torch

    from .analysis.autoencoder import learn
    from .analysis.features import features_of, open_its_data
    from .analysis.retrieval import nearest, nearest_codes, packed, recall
    from .analysis.trained import open_trained
    from .common import seeds
    from .common.allocator import keep_freed_memory
    from .common.device import choose, describe
    from .common.progress import Progress
    from .data.images import Split
    from .readers.files import free_host_memory

    device = choose(config.device)
    keep_freed_memory()
    trained = open_trained(config.checkpoint, device)
    data, mean = open_its_data(trained, config.data_path, device)
    if len(data.train) < LOOKED_AT[-1]:
        raise DataError(f"at least {LOOKED_AT[-1]} training images are needed; got {len(data.train)} in {data.name}")
    drawn = seeds.sample(config.seed).permutation(len(data.val))[: config.queries]
    query_images = Split(data.val.images[drawn], data.val.labels[drawn])
    print(
        f"{len(query_images):,} validation images against {len(data.train):,} training images of {data.name}",
        flush=True,
    )
    with Progress("images", len(query_images) + len(data.train)) as progress:
        queries = torch.cat(list(features_of(trained, query_images, mean, config.batch_size, progress.update)))
        width = queries.shape[1]
        if (needed := 4 * width * len(data.train)) > 0.8 * free_host_memory():
            raise DataError(f"the features of {len(data.train):,} images take {needed / 2**30:,.1f} GiB of memory")
        vectors = torch.empty(len(data.train), width)
        first = 0
        for part in features_of(trained, data.train, mean, config.batch_size, progress.update):
            vectors[first : first + len(part)] = part
            first += len(part)
    queries = queries.cpu()

    with Progress("vectors compressed", config.epochs * len(vectors)) as progress:
        model, error = learn(
            vectors.to(device), config.bits, epochs=config.epochs, seed=config.seed, progress=progress.update
        )
    planes = torch.randn(width, config.bits, generator=seeds.planes(config.seed))
    centre = vectors.mean(0)
    codes = {
        "autoencoder": [packed(model.bits(part.to(device))) for part in (queries, vectors)],
        "random_hyperplanes": [packed((part - centre) @ planes > 0) for part in (queries, vectors)],
    }

    def timed(search: Any) -> tuple[Any, float]:
        """The result of a search, and its queries per second."""
        seconds = []
        for _ in range(TIMINGS):
            began = time.perf_counter()
            found = search()
            seconds.append(time.perf_counter() - began)
        return found, len(query_images) / min(seconds)

    (_, numbers), exact_speed = timed(lambda: nearest(queries, vectors.split(_PART), EXACT))
    exact = numbers.numpy()
    query_codes, searched_codes = codes["autoencoder"]
    _, hamming_speed = timed(lambda: nearest_codes(query_codes, searched_codes, EXACT))
    recalls: dict[str, dict[str, float]] = {}
    for name, (theirs, ours) in codes.items():
        found = nearest_codes(theirs, ours, LOOKED_AT[-1])
        recalls[name] = {f"recall_at_{count}": recall(found[:, :count], exact) for count in LOOKED_AT}
    return {
        "network": trained.name,
        "data": data.name,
        "training_images": len(vectors),
        "queries": len(query_images),
        "features": width,
        "bits": config.bits,
        "bytes_per_image": {"features": 4 * width, "code": config.bits // 8},
        "epochs": config.epochs,
        "variance_missed": error,
        "exact_neighbours": EXACT,
        **recalls,
        "chance": {f"recall_at_{count}": count / len(vectors) for count in LOOKED_AT},
        "queries_per_s": {"exact": exact_speed, "hamming": hamming_speed},
        "search_ran_on": f"{describe(torch.device('cpu'))} (exact), one thread (Hamming)",
        "torch": torch.__version__,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    config = cli.resolve(cli.given(HashingConfig, "net.hashing", DESCRIPTION, arguments), HashingConfig)
    check_writable("--output", config.output)
    network = pretrained.find(config.checkpoint)
    cli.check_exist(data_path=config.data_path)
    cli.load("analysis.autoencoder", "analysis.features", "analysis.trained")
    result = _hash(config)
    output = Path(config.output) if config.output is not None else runs.results_folder(network) / "hashing.json"
    speed, size = result["queries_per_s"], result["bytes_per_image"]
    for name in ("autoencoder", "random_hyperplanes", "chance"):
        shares = ", ".join(f"{100 * result[name][f'recall_at_{count}']:.1f} % in {count}" for count in LOOKED_AT)
        print(f"{name.replace('_', ' '):<18}  recall of the {EXACT} nearest by Euclidean distance: {shares} codes")
    print(
        f"{config.bits} bits: {size['code']} bytes per image instead of {size['features']:,}; "
        f"{speed['hamming']:,.0f} queries/s by Hamming distance, {speed['exact']:,.0f} exact; "
        f"{result['search_ran_on']}"
    )
    with atomic_write(output) as file:
        file.write(json.dumps(result, indent=1).encode())
    print(f"written to {output}")
    return 0


if __name__ == "__main__":
    cli.run(main)

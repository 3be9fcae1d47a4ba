"""Every layer by itself: forward, gradient of the input, gradient of the weights."""

from ..measure.records import time_columns
from ..measure.timing import seconds, wall_seconds
from ..subjects.cases import failure
from ..subjects.network import layer_calls
from .run import Rows, Run


def rows(run: Run) -> Rows:
    """One row per mode of each layer, from a graph whose calls do not find their tensors in the cache."""
    limits = run.ceilings()
    for layer in layer_calls(run.scale.network, run.scale.images, "bfloat16", run.device):
        # Input preparation copies random numbers from the host, which a graph cannot capture.
        called = not run.cuda or layer.name == "input preparation"
        described = {
            "suite": "layers",
            "case": layer.name,
            "implementation": "auto, eager" if called else "auto, graph",
            "mode": layer.mode,
            "dtype": "bfloat16",
            "memory_format": "channels_last",
            "images": run.scale.images,
        }
        try:
            if called:
                times = wall_seconds(layer.calls[0], run.samples)
            else:
                (times,) = seconds([layer.calls], run.device, run.samples)
        except Exception as error:  # Any error becomes the row's status, and the other layers continue.
            yield {**described, "status": failure(error)}
            continue
        columns = time_columns(times)
        rate = round(run.scale.images / columns["median_us"] * 1e6, 1)
        work = layer.work.columns(columns["median_us"], "bfloat16", limits)
        yield {**described, **columns, "images_per_s": rate, **work, **layer.columns}

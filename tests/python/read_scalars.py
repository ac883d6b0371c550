"""Prints every scalar of a directory of event files: tag to list of [step, value], NaN as null."""
import json, math, sys
try:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
except ImportError as error:
    sys.exit(f"{error}: this test needs the Python package tensorboard, which `make test` installs")
accumulator = EventAccumulator(sys.argv[1], size_guidance={"scalars": 0, "tensors": 0})
accumulator.Reload()
print(json.dumps({
    tag: [[e.step, None if math.isnan(e.value) else e.value] for e in accumulator.Scalars(tag)]
    for tag in accumulator.Tags()["scalars"]
}))

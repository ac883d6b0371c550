"""Describes a value as JSON: the same form as the Rust side of the test prints."""
import collections, json, sys, torch

def describe(x):
    if isinstance(x, torch.Tensor):
        kind = str(x.dtype).removeprefix("torch.")
        bits = x.detach().contiguous().flatten().view(torch.uint8) if x.numel() else torch.empty(0, dtype=torch.uint8)
        return ["tensor", kind, list(x.shape), bits.tolist()]
    if isinstance(x, collections.OrderedDict):
        return ["odict", [[describe(k), describe(v)] for k, v in x.items()],
                [[k, describe(v)] for k, v in sorted(getattr(x, "__dict__", {}).items())]]
    if isinstance(x, dict):
        return ["dict", [[describe(k), describe(v)] for k, v in x.items()]]
    if isinstance(x, (tuple, list)):
        return ["tuple" if isinstance(x, tuple) else "list", [describe(y) for y in x]]
    if isinstance(x, (torch.dtype, torch.device)):
        return ["str", str(x)]
    if isinstance(x, bytes):
        return ["bytes", list(x)]
    return [type(x).__name__, repr(x) if isinstance(x, float) else x]

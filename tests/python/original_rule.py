"""The layer as the original writes it, with nothing detached from the activations: arguments are the folder of
bitbytelm.py, the given tensors and the file to write."""
import sys
from torch.nn.functional import linear
from safetensors.torch import load_file, save_file
sys.path.insert(0, sys.argv[1])
from bitbytelm import ternary

given = load_file(sys.argv[2])
x, weight = (given[name].requires_grad_() for name in ("x", "weight"))
scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-8) / 127
y = linear((x / scale).round().clamp(-127, 127) * scale, ternary(weight, clipped=True))
y.backward(given["upstream"])
save_file({"y": y.detach(), "x": x.grad, "weight": weight.grad}, sys.argv[3])

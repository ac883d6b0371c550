"""What plain PyTorch makes of single training steps, each from weights that it is given."""

import json
import sys

import bitbytelm
import torch
import torch.nn.functional as F
from bitbytelm import BitLinear, model_of
from safetensors.torch import load_file, save_file


def model_in(checkpoint, ste):
    checkpoint = torch.load(checkpoint)
    model = model_of(checkpoint["args"])
    model.load_state_dict(checkpoint["model"], strict=True)
    for module in model.modules():
        if isinstance(module, BitLinear):
            module.clipped = ste == "clipped"
    return model


def loss_and_gradients(model, tokens):
    loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def decided(*cases):
    """A step in fp64 on windows in which no rounding is close: where fp32 of any CPU makes the same codes. Each case is
    a checkpoint, an estimator, and the file that tokens, loss and gradients go to.

    Of 512 random windows of 12 bytes it takes the four whose codes are furthest from turning, and prints how far that
    is: of weights and of activations, in units of the codes."""
    for checkpoint, ste, outputs in zip(*[iter(cases)] * 3):
        model = model_in(checkpoint, ste).double()
        tokens = torch.randint(0, 256, (512, 13), generator=torch.Generator().manual_seed(0))
        bitbytelm.margins = {"weights": [], "activations": []}
        with torch.no_grad():
            model(tokens[:, :-1])
        of_weights, of_activations = (bitbytelm.margins[what] for what in ("weights", "activations"))
        bitbytelm.margins = {"weights": None, "activations": None}
        margins = {"weights": min(rows.min().item() for rows in of_weights), "activations": 0.5}
        if of_activations:
            best = torch.stack(of_activations).amin(0).amin(-1).topk(4)
            margins["activations"] = best.values.min().item()
            tokens = tokens[best.indices]
        tokens = tokens[:4]
        loss, gradients = loss_and_gradients(model, tokens)
        numbers = {f"grad.{name}": gradient for name, gradient in gradients.items()}
        save_file({"tokens": tokens, "loss": loss, **numbers}, outputs)
        print(json.dumps(margins))


def steps(batches, ste, *checkpoints):
    """The loss and the gradient's norm, in fp32, of batch s by the weights of checkpoint s: a line of JSON each."""
    for batch, checkpoint in zip(load_file(batches)["batches"].long(), checkpoints):
        loss, gradients = loss_and_gradients(model_in(checkpoint, ste), batch)
        norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
        print(json.dumps({"loss": loss.item(), "grad_norm": norm.item()}))


if __name__ == "__main__":
    {"decided": decided, "steps": steps}[sys.argv[1]](*sys.argv[2:])

"""What a script of these tests can use: `golden()` is the checkpoint golden.pt, of 20 steps; `save` writes a changed one
and checks that plain `torch.load` reads it."""
import collections, os, sys, warnings
import torch
warnings.simplefilter("ignore")
repository = sys.argv[2]
os.chdir(sys.argv[1])

def golden():
    return torch.load("golden.pt")

def save(name, change=lambda c: None, value=None):
    c = golden() if value is None else value
    change(c)
    torch.save(c, name)
    torch.load(name)

def put(*path):
    "A change: `put('args', 'n_layer', 2)` sets c['args']['n_layer'] = 2."
    def change(c):
        for key in path[:-2]:
            c = c[key]
        c[path[-2]] = path[-1]
    return change

"""Writes checkpoints that ask for a global which plain torch.load refuses, and one of the old format."""
import os, sys, torch
class Evil:
    def __reduce__(self):
        return os.mkdir, (os.path.join(sys.argv[1], "called"),)
os.chdir(sys.argv[1])
torch.save({"model": Evil(), "model_family": "bitbyte"}, "evil.pt")
torch.save({"model": {}, "when": __import__("datetime").date(2020, 1, 1)}, "date.pt")
torch.save({"model": {}}, "old.pt", _use_new_zipfile_serialization=False)

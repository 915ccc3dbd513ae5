"""What the server of `support.forking` has imported before it forks."""

import importlib

from megacode.importing import uncollected

MODULES = ("pytest", "megacode.train.main", "torch._dynamo")

with uncollected():
    for module in MODULES:
        importlib.import_module(module)
    importlib.import_module("megacode.engine.private").import_muon_plainly()

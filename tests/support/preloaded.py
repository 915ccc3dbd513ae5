"""What the server of `support.forking` has imported before it forks."""

import importlib

from megacode.importing import uncollected

# DeepSpeed imports muon_optimizer when an engine is made, and with it torch's compiler: seconds in which a rank stands.
MODULES = ("pytest", "megacode.train.main", "torch._dynamo", "deepspeed.runtime.zero.muon.muon_optimizer")

with uncollected():
    for module in MODULES:
        importlib.import_module(module)

"""`torchrun ... -m megacode.train RECIPE`: what launchers/train.py does, where there is no checkout."""

import sys

from megacode.importing import uncollected
from megacode.train import interrupt

interrupt.begin()
with uncollected():
    from megacode.train.main import main

sys.exit(main(sys.argv[1:]))

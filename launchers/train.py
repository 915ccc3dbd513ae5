"""What `deepspeed`, `torchrun` and `srun` start: train a recipe. All of it is in megacode.train.main."""

import sys

try:
    from megacode.importing import uncollected
    from megacode.train import interrupt

    if __name__ == "__main__":  # not in data workers, which import this too
        interrupt.begin()
    with uncollected():
        from megacode.train.main import main
except ModuleNotFoundError as error:
    if error.name != "megacode":
        raise
    sys.exit(
        "error: megacode is not installed in this Python; run `make setup`, or pip install -c constraints.txt -e ."
    )

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

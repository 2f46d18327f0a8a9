"""`python -m folo_lib "Once upon a time"`: the command `folo`, see `folo_lib.cli`."""

from folo_lib.cli import main

if __name__ == "__main__":
    main(prog="python -m folo_lib")

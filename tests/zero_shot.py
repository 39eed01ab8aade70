"""Run under torchrun by test_trainer.py: the patched trainer, with one zero-shot prompt a class
instead of 80."""

import os
import sys
from importlib import import_module

main, zero_shot = (
    import_module(f"{os.environ['TRAINER']}.{name}") for name in ("main", "zero_shot")
)

zero_shot.OPENAI_IMAGENET_TEMPLATES = zero_shot.OPENAI_IMAGENET_TEMPLATES[:1]
main.main(sys.argv[1:])

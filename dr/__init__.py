"""Dataset reinforcement for CLIP: what runs inside training.

``transforms``      augmentations whose parameters can be stored and applied again, exactly
``reinforcement``   one sample of DataCompDR: decode, choose, and keep the rows that belong together
``data``            the WebDataset stages that turn shards into reinforced batches
``sampling``        which sample comes when, without replacement: pure functions
``shard_reader``    any sample of any shard, by its place
``loader``          what the trainer iterates over: counts what is skipped, and samples without replacement
``loss``            the distillation loss
``step``            what the training step does with a reinforced batch
``params``          command-line options and their checks
``checkpoint``      checkpoints within epochs, written whole or not at all, and resumed without unpickling

Here the package is ``dr``; in the patched OpenCLIP tree it is ``training.dr``. Downloading, joining and making
reinforcements are not its business: see ``scripts/``.
"""

"""Dataset reinforcement for CLIP: what runs inside training.

A sample takes this way to the training step:

``tar``          members of tars, grouped into samples
``sources``      samples of shards in the order of the trainer, or in passes
``sampling``     which sample comes when, without replacement: pure functions
``sample``       one sample: decode it, choose from it, augment it
``transforms``   augmentations whose parameters are stored and applied again, exactly
``chain``        from samples to batches, in a loader's worker
``loader``       the loaders that the trainer iterates over
``batch``        a batch, and its split between the model and the loss
``loss``         the distillation loss

and around it:

``pipeline``     what the patch calls in OpenCLIP's data loading
``params``       command-line options and their rules
``run``          checkpoints within epochs, pre-emption, skipped samples, losses that are not finite
``checkpoint``   checkpoint files
``towers``       locked towers, and gradient checkpointing that works with them
``weights``      model configs of newer OpenCLIP releases, released weights and their statistics

Here the package is ``dr``; in the patched OpenCLIP tree it is ``training.dr``. It does not cover
downloading, joining and making reinforcements: see ``scripts/``.
"""

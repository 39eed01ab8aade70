"""Dataset reinforcement for CLIP: the code that runs inside training.

A sample passes through these modules to the training step:

``tar``          members of tars, grouped into samples
``sources``      samples of shards in the order of the trainer, or in passes
``sampling``     the order of samples without replacement: pure functions
``sample``       one sample: decode it, select from it, augment it
``transforms``   augmentations whose parameters are stored and applied again, exactly
``chain``        from samples to batches, in a loader's worker
``loader``       the loaders that the trainer iterates over
``batch``        a batch, and its split between the model and the loss
``loss``         the distillation loss

and these are used around it:

``pipeline``     the functions that the patch calls in OpenCLIP's data loading
``params``       command-line options and their rules
``run``          checkpoints within epochs, pre-emption, skipped samples, losses that are not finite
``checkpoint``   checkpoint files
``towers``       locked towers, gradient checkpointing that works with them, BatchNorm statistics
``weights``      model configs of the installed OpenCLIP; preprocessing of released weights

Here the package is ``dr``; in the patched OpenCLIP tree it is ``training.dr``. Downloading, joining
and reinforcing are in ``scripts/``. ``reinforcement`` is an earlier name of ``sample``.
"""

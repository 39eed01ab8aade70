"""Resume from a checkpoint without unpickling what it likes.

OpenCLIP's checkpoints hold the learning rate as a NumPy scalar (ours as a float), which ``weights_only=True`` refuses
unless NumPy's scalars are allowed by name. Nothing else is.
"""

import numpy as np
import torch


def load(file, map_location=None):
    """``torch.load(…, weights_only=True)`` that also takes NumPy numbers, as written by NumPy 1 and 2.

    Args:
        file: path or binary file.
        map_location: as in ``torch.load``.
    """
    scalar = np.float64(0).__reduce__()[0]  # the function that pickled NumPy scalars are made by
    allowed = [np.dtype, *(type(np.dtype(kind)) for kind in ("f8", "f4", "i8", "i4", "?"))]
    allowed += [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    with torch.serialization.safe_globals(allowed):
        return torch.load(file, map_location=map_location, weights_only=True)

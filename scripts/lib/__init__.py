"""Code that several commands share. It imports ``dr``, and never a command.

Commands run as ``python scripts/x.py`` from any folder, so this package, which every command
imports first, puts the repository's root on the module search path.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

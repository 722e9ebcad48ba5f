"""Imported first by the scripts that compare with PyTorch and transformers: where a package is missing, one line says so."""

import pathlib
import sys

try:
    import torch  # noqa: F401
    import transformers  # noqa: F401
except ImportError as error:
    print(f"{pathlib.Path(sys.argv[0]).name}: error: the Python package {error.name} is missing; install what it needs "
          "with: pip install -r dev/requirements-golden.txt", file=sys.stderr)
    sys.exit(2)

"""Before any test imports torch: waiting threads sleep, else trainer and engine starve each other on a small machine."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

"""In a process that a test starts: the driver stand-in, before anything else."""

import os
import sys
from pathlib import Path

if os.environ.get("CUFLASH_TEST_DRIVER"):
    sys.path.append(str(Path(__file__).resolve().parents[2]))
    from fake_cuda import stand_in

    stand_in.install()

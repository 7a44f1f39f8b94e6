"""No test may reach a network, a GPU or the user's caches; tests run on one thread for repeatable sums."""

from __future__ import annotations

import os
import tempfile

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_HOME": tempfile.mkdtemp(prefix="hf_ls_tests_"),
    "CUDA_VISIBLE_DEVICES": "",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "Agg",
    "OMP_NUM_THREADS": "1",
}

"""What every test shares: no network, one torch thread per worker, and no waiting for the disk."""

from __future__ import annotations

import os

# Set before any test imports these libraries: they read it once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What a power cut leaves no test can see; that files are flushed, and when, is what `test_durable` looks at.
os.fsync = lambda descriptor: None

"""The torch engine: any causal language model of transformers over a paged KV pool.

Threads of OpenMP wait passively: spinning at barriers stalls a step whenever another process takes a core.
This must be said before torch is loaded.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

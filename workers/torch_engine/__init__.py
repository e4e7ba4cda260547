"""The torch engine: any causal language model of transformers over a paged KV pool.

OpenMP's threads, which compute what is left to torch, wait passively: spinning at barriers stalls a step whenever
another process takes a core (workers/native/team.inc has a better way, for the native kernels).
This must be said before torch is loaded.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

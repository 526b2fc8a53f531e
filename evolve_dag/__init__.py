"""Self-evolving LLM agents as a declarative data-and-training DAG.

On the ground floor stand what every room uses (records, protocols, errors, prompts, secrecy, plain text, seeds, JSON lines)
and the doors (the command line, the definitions that Dagster loads, the doctor). Everything else has a room. Which room may
import which stands in pyproject.toml (``tool.importlinter``); a room imports what lies below it, never what lies above.
"""

import os

# Models are small here, and threads that wait for each other by spinning take the core away from whom they wait for as soon as
# anything else runs. OpenMP reads this once, when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

"""How many odd calls: some thousands as a rule, ODD_TIMES as many where it is set, drawn by ODD_SEED."""

import os

TIMES = int(os.environ.get("ODD_TIMES", "1"))
SEED = int(os.environ.get("ODD_SEED", "0"))

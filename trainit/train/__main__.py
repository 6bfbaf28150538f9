"""Says what to do to whoever runs `python -m trainit.train`."""

import sys

sys.stderr.write(
    "trainit: error: trainit.train is no command: trainit train --config=FILE, or\n"
    "python -m trainit.main --config=FILE, for example --config=configs/debug.py\n"
)
sys.exit(2)

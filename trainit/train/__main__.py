"""Says what to do to whoever runs `python -m trainit.train`."""

import sys

sys.stderr.write("trainit: error: trainit.train is no command; run trainit train --config=FILE\n")
sys.exit(2)

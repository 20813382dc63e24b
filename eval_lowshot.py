"""Low-shot evaluation: `python eval_lowshot.py checkpoint=...`, see configs/eval_lowshot.yaml."""

import sys

from msn.__main__ import run_named

if __name__ == "__main__":
    run_named("eval_lowshot", sys.argv[1:])

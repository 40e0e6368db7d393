"""The modiff command as a script, for launchers that start a file.

fabric run --devices 2 recipes/run.py evaluate --config recipes/mnist/w8a4_modiff.yaml
torchrun --nproc-per-node 2 recipes/run.py evaluate --config recipes/mnist/w8a4_modiff.yaml
srun python recipes/run.py evaluate --config recipes/mnist/w8a4_modiff.yaml
"""

import sys

from modiff.lit.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

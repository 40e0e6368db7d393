"""The modiff command as a script, for launchers that start a file.

fabric run --devices 2 recipes/run.py evaluate --config recipes/mnist/w8a4_modiff.yaml --trainer.devices 2
torchrun --nproc-per-node 2 recipes/run.py evaluate --config recipes/mnist/w8a4_modiff.yaml --trainer.devices 2
srun python recipes/run.py evaluate --config recipes/mnist/w8a4_modiff.yaml --trainer.devices 8 --trainer.num_nodes 4
"""

import sys

from modiff.lit.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

"""Fine-tune a base on photos of a subject: `python train.py fit --config configs/train_full.yaml
--data.instance_dir DIR ...`.
"""

from dreamblend.__main__ import main

if __name__ == "__main__":
    main()

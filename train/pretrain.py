"""Pretrain the two towers on volume-report pairs.

deepspeed --num_gpus 2 train/pretrain.py --config configs/pretrain/base.yaml optim.lr=1e-4
"""

from ctclip.cli import pretrain

if __name__ == "__main__":
    pretrain()

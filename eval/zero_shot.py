"""Score volumes zero-shot, with AUROC per finding where labels are known.

python eval/zero_shot.py --ckpt model.safetensors --cohort prepared/3f9c2e
python eval/zero_shot.py --ckpt model.safetensors --volume scan.nii.gz
"""

from ctclip.cli import zero_shot

if __name__ == "__main__":
    zero_shot()

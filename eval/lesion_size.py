"""How small a nodule can a model see? Plants nodules into your own negative scans.

python eval/lesion_size.py --ckpt model.safetensors --volumes scans/*.nii.gz --out results/size
"""

from ctclip.cli import lesion_size

if __name__ == "__main__":
    lesion_size()

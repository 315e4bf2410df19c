"""How well does a model fit its own training set? A verdict per disease.

python eval/train_fit.py --ckpt model.safetensors --cohort prepared/3f9c2e --out results/train_fit
"""

from ctclip.cli import train_fit

if __name__ == "__main__":
    train_fit()

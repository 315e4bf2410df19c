"""Does it matter which hospital wrote the report? The same studies in several styles.

python eval/styles.py --ckpt model.safetensors --cohort prepared/3f9c2e --reports a.csv b.csv
python eval/styles.py --ckpt model.safetensors --cohort prepared/3f9c2e --truth phantoms/truth.csv
"""

from ctclip.cli import styles

if __name__ == "__main__":
    styles()

"""Find labels that are probably wrong; apply a reader's decisions.

python eval/label_audit.py --ckpt model.safetensors --cohort prepared/3f9c2e --out results/audit
python eval/label_audit.py --apply results/audit/review.csv --manifest manifest.csv \
    --reviewer "A. Reader" --out corrected.csv
"""

from ctclip.cli import label_audit

if __name__ == "__main__":
    label_audit()

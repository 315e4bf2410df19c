"""Evaluate and compare the scores of any number of models.

python eval/report.py ours.parquet theirs.csv --protocol ct-rate-18 --out results/comparison
python eval/report.py ct_clip_results/ --protocol ct-clip
"""

from ctclip.cli import evaluate

if __name__ == "__main__":
    evaluate()

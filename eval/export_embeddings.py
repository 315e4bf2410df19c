"""Embed a prepared cohort's volumes and reports.

python eval/export_embeddings.py --ckpt model.safetensors --cohort prepared/ab12cd --out embeddings
python eval/export_embeddings.py --ckpt model.safetensors --manifest scans.csv --out embeddings
"""

from ctclip.cli import embed

if __name__ == "__main__":
    embed()

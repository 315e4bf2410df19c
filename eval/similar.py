"""Find the cases most similar to a study, a scan or a text.

python eval/similar.py --table embeddings/volumes.parquet --study p12_a --out similar
"""

from ctclip.cli import similar

if __name__ == "__main__":
    similar()

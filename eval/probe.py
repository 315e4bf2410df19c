"""Linear probes on exported embeddings, from one case of each class to all of them.

python eval/probe.py --train train.parquet --test test.parquet --out results/probe
"""

from ctclip.cli import probe

if __name__ == "__main__":
    probe()

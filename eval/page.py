"""Serve the page for similar cases on this machine.

python eval/page.py --ckpt model.safetensors --table embeddings/volumes.parquet
"""

from ctclip.cli import page

if __name__ == "__main__":
    page()

"""Measure how good an export is for finding cases: like cases, own reports, each finding.

python eval/retrieval.py --table archive/volumes.parquet --reports archive/reports.parquet
"""

from ctclip.cli import retrieval_quality

if __name__ == "__main__":
    retrieval_quality()

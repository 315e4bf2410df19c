"""Volumes and reports → EmbeddingTable, the one artefact that evaluation and retrieval share.

A table knows which model and which preprocessing made it, and refuses to meet a table of another.
It holds identifiers, vectors and labels; anything else about a patient only if asked for by name.
"""

from ctclip.embeddings.encode import embed_file, embed_texts, embed_voxels
from ctclip.embeddings.export import DEFAULT_FIELDS, embed_reports, embed_volumes, space_of
from ctclip.embeddings.health import Health, health
from ctclip.embeddings.table import EmbeddingError, EmbeddingTable, concatenate
from ctclip.embeddings.transform import Transform

__all__ = [
    "DEFAULT_FIELDS",
    "EmbeddingError",
    "EmbeddingTable",
    "Health",
    "Transform",
    "concatenate",
    "embed_file",
    "embed_reports",
    "embed_texts",
    "embed_volumes",
    "embed_voxels",
    "health",
    "space_of",
]

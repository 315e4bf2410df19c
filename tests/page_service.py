"""An archive of phantom chests behind an untrained model: enough to click through the page."""

from pathlib import Path

import torch

from ctclip import checkpoint as checkpoints
from ctclip.data.cache import PreparedCohort, prepare
from ctclip.data.manifest import read_manifest
from ctclip.data.volume import VolumeConfig
from ctclip.embeddings import EmbeddingTable, embed_reports, embed_volumes
from ctclip.evaluation.scanner import Scanner
from ctclip.models.ctclip import ModelConfig, build_model
from ctclip.models.text import Tokenizer
from ctclip.phantom import cohort as phantoms
from ctclip.retrieval.jobs import PageConfig, make_service
from ctclip.retrieval.service import CaseService

VOLUMES = VolumeConfig(spacing_mm=(10.0, 7.5, 7.5), size=(32, 48, 48))
FIELDS = ("sex", "age", "hospital", "manufacturer", "report")

MODEL = {
    "embed_dim": 32,
    "vision": {"size": "tiny", "width": 32, "depth": 1, "heads": 2, "patch": (8, 12, 12)},
    "text": {"name_or_path": None, "width": 32, "layers": 1, "heads": 2, "pooling": "mean"},
}


def write_archive(folder: Path, num_patients: int = 10) -> PageConfig:
    """Phantoms, prepared and embedded; returns what the page is started with."""
    from ctclip.config import from_dict

    torch.manual_seed(0)
    config = phantoms.PhantomConfig(num_patients=num_patients, shape=(40, 64, 64), workers=1)
    manifest = phantoms.build(config, folder / "phantom")
    records, problems = read_manifest(manifest)
    cohort = prepare(records, folder / "prepared", VOLUMES, problems=problems)
    model_config = from_dict(ModelConfig, MODEL)
    model = build_model(model_config).eval()
    path = folder / "model.safetensors"
    checkpoints.save(path, model, Tokenizer.builtin(), model_config, VOLUMES, {"step": 0})
    checkpoint = checkpoints.load(path)
    embed_volumes(checkpoint, cohort, out=folder / "volumes.parquet", fields=FIELDS)
    embed_reports(checkpoint, cohort.records, fields=FIELDS).save(folder / "reports.parquet")
    return PageConfig(
        table=folder / "volumes.parquet",
        reports=folder / "reports.parquet",
        cohort=folder / "prepared" / VOLUMES.fingerprint(),
        state=folder / "results",
    )


def open_service(folder: Path, config: PageConfig) -> CaseService:
    """The service over what :func:`write_archive` wrote."""
    return make_service(config, Scanner(checkpoints.load(folder / "model.safetensors")))


def table_and_cohort(folder: Path, config: PageConfig) -> tuple[EmbeddingTable, PreparedCohort]:
    """The archive itself, to judge answers by."""
    assert config.table is not None
    assert config.cohort is not None
    return EmbeddingTable.load(config.table), PreparedCohort.open(config.cohort)

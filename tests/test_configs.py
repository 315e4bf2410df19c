import json
from pathlib import Path

import pytest

from ctclip import config

CONFIGS = Path(__file__).parents[1] / "configs"
PLACES = {
    "pretrain": ["cohort=c", "out=o"],
    "embed": ["checkpoint=m", "cohort=c", "out=o"],
    "retrieval": ["table=t"],
}
"""Locations come from the command line, never from a file."""


def _schema(folder: str) -> type:
    if folder == "phantom":
        from ctclip.phantom.cohort import PhantomConfig

        return PhantomConfig
    if folder == "prepare":
        from ctclip.data.volume import VolumeConfig

        return VolumeConfig
    if folder == "pretrain":
        from ctclip.training.pretrain import PretrainConfig

        return PretrainConfig
    if folder == "embed":
        from ctclip.embeddings.job import EmbedConfig

        return EmbedConfig
    if folder == "zero_shot":
        from ctclip.evaluation.zero_shot import ZeroShotConfig

        return ZeroShotConfig
    if folder == "train_fit":
        from ctclip.evaluation.train_fit import TrainFitConfig

        return TrainFitConfig
    if folder == "label_audit":
        from ctclip.evaluation.review import ReviewConfig

        return ReviewConfig
    if folder == "lesion_size":
        from ctclip.evaluation.lesion_size import LesionSizeConfig

        return LesionSizeConfig
    if folder == "probe":
        from ctclip.evaluation.few_shot import FewShotConfig

        return FewShotConfig
    if folder == "retrieval":
        from ctclip.retrieval.quality import QualityConfig

        return QualityConfig
    raise AssertionError(f"configs/{folder} belongs to no command")


@pytest.mark.parametrize(
    "path", sorted(CONFIGS.glob("*/*.yaml")), ids=lambda p: f"{p.parent.name}/{p.stem}"
)
def test_every_config_loads_and_opens_with_its_command(path):
    config.load(_schema(path.parent.name), path, PLACES.get(path.parent.name, []))

    comment = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(word in " ".join(comment) for word in ("ctclip-", ".py"))


@pytest.mark.parametrize(
    "path", sorted((CONFIGS / "deepspeed").glob("*.json")), ids=lambda p: p.stem
)
def test_every_deepspeed_file_holds_sharding_only(path):
    assert set(json.loads(path.read_text())) <= {"zero_optimization", "checkpoint"}

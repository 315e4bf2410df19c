from pathlib import Path

import pytest

from ctclip import config
from ctclip.evaluation.few_shot import FewShotConfig
from ctclip.evaluation.label_audit import AuditConfig
from ctclip.evaluation.lesion_size import LesionSizeConfig
from ctclip.evaluation.scoring import ZeroShotConfig
from ctclip.evaluation.train_fit import TrainFitConfig

CONFIGS = Path(__file__).parents[2] / "configs"
SCHEMAS = {
    "zero_shot": ZeroShotConfig,
    "train_fit": TrainFitConfig,
    "label_audit": AuditConfig,
    "lesion_size": LesionSizeConfig,
    "probe": FewShotConfig,
}
FILES = [(folder, path) for folder in SCHEMAS for path in sorted((CONFIGS / folder).glob("*.yaml"))]


@pytest.mark.parametrize(("folder", "path"), FILES, ids=lambda value: getattr(value, "stem", value))
def test_every_config_loads_and_opens_with_its_command(folder, path):
    assert config.load(SCHEMAS[folder], path) != SCHEMAS[folder]()
    assert f"eval/{folder}.py" in path.read_text().split("\n\n")[0]

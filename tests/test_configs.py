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


def pretrain_config(*overrides):
    from ctclip.training.pretrain import PretrainConfig

    return config.load(
        PretrainConfig, CONFIGS / "pretrain" / "tiny.yaml", [*PLACES["pretrain"], *overrides]
    )


@pytest.mark.parametrize(
    "override",
    [
        "steps=0",
        "steps=-5",
        "micro_batch_size=0",
        "micro_batch_size=-2",
        "batch_size=1",
        "seed=-1",
        "seed=18446744073709551616",
        "workers=-1",
        "windows_hu=[]",
        "windows_hu=[[100,-100]]",
        "windows_hu=[[-1000,.nan]]",
        "checkpoint.every=-1",
        "checkpoint.keep=0",
        "checkpoint.evaluate_every=-1",
        "checkpoint.patience=-1",
        "monitor.log_every=0",
        "guard.max_skipped=0",
        "guard.loss_limit=0",
        "guard.loss_limit=.nan",
        "optim.lr=0",
        "optim.lr=.nan",
        "optim.lr=.inf",
        "optim.volume_lr_scale=-1",
        "optim.text_lr_scale=-1",
        "optim.weight_decay=-0.1",
        "optim.betas=[0.9,1]",
        "optim.betas=[-0.1,0.9]",
        "optim.eps=-1",
        "optim.eps=0",
        "optim.warmup_steps=-5",
        "optim.final_lr_share=7",
        "optim.grad_clip=-1",
        "optim.layer_decay=0",
        "optim.layer_decay=1.5",
        "optim.ema_decay=1.5",
        "optim.ema_decay=1",
        "loss.report=-1",
        "loss.sentence=-1",
        "loss.opposite=-1",
        "loss.directions=-1",
        "loss.report=.nan",
        "loss.silence=-3",
        "loss.soft_targets=1.5",
        "text.drop_section=3",
        "text.synonyms=-1",
        "text.template_share=7",
        "text_warmup.steps=-3",
        "text_warmup.lr=0",
        "text_warmup.batch_size=0",
        "text_warmup.scale=0",
        "text_warmup.directions=-1",
        "text_warmup.template_share=1.5",
        "augment.probability=1.5",
        "augment.noise_hu=-1",
        "augment.scale=1",
        "augment.crop_voxels=[0,8,8]",
        "model.embed_dim=0",
        "model.logit_scale_init=.nan",
        "model.vision.depth=0",
        "model.text.width=0",
    ],
)
def test_a_number_that_means_nothing_is_refused_by_the_key_that_was_typed(override):
    key = override.split("=")[0]

    with pytest.raises(config.ConfigError) as refused:
        pretrain_config(override)

    said = str(refused.value).removeprefix(f"{CONFIGS / 'pretrain' / 'tiny.yaml'}: ")
    assert said.startswith(f"{key} must ")


@pytest.mark.parametrize(
    "overrides",
    [
        ["checkpoint.every=0"],
        ["checkpoint.evaluate_every=5", "checkpoint.patience=1"],
        ["optim.grad_clip=0", "optim.weight_decay=0", "optim.warmup_steps=0"],
        ["optim.volume_lr_scale=0"],
        ["optim.text_lr_scale=0"],
        ["optim.final_lr_share=1", "optim.ema_decay=0.999", "optim.layer_decay=1"],
        ["loss.silence=0", "loss.directions=0", "loss.soft_targets=0.3"],
        ["text.drop_section=1", "text.synonyms=1", "text.template_share=0"],
        ["text_warmup.steps=0", "workers=0", "seed=0", "micro_batch_size=1", "steps=1"],
        ["augment.rotate_degrees=0", "augment.scale=0", "augment.crop_voxels=null"],
        ["loss.contrastive=siglip", "model.logit_bias_init=-10"],
    ],
    ids=" ".join,
)
def test_zero_is_taken_where_it_switches_something_off(overrides):
    assert pretrain_config(*overrides)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["loss.contrastive=siglip", "loss.soft_targets=0.3"], "loss.soft_targets=0.3"),
        (["loss.report=0", "loss.contrastive=siglip"], "loss.contrastive=siglip"),
        (["loss.report=0", "loss.soft_targets=0.3"], "loss.soft_targets=0.3"),
        (["loss.report=0", "loss.ignore_normal_pairs=true"], "loss.ignore_normal_pairs=true"),
        (["loss.opposite=0", "loss.label_informed=true"], "loss.label_informed=true"),
        (["model.logit_bias_init=-10"], "model.logit_bias_init=-10.0"),
        (["checkpoint.patience=1"], "checkpoint.patience=1 .* checkpoint.evaluate_every=0"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_a_setting_that_nothing_would_read_is_refused_by_name(overrides, named):
    with pytest.raises(config.ConfigError, match=f": {named} "):
        pretrain_config(*overrides)

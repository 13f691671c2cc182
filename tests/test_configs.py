"""Every shipped config is built, and each head is asked which loss and sampler it really has."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import nn

pytest.importorskip("mmseg", reason="the configs are mmseg's")

from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmengine.structures import PixelData
from mmseg import registry
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample

from ohem_mm import OhemCrossEntropyLoss, RegionLoss, RegionRule, cli
from ohem_mm.bench.files import load_benchmark
from ohem_mm.bench.records import read_records

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
FILES = sorted(p for p in CONFIGS.rglob("*.py") if "_base_" not in p.parts)
NAME = re.compile(
    r"(?P<stem>[a-z0-9-]+(?:_[a-z0-9-]+)*)_(?P<gpus>\d+)xb(?P<batch>\d+)"
    r"(?:-(?P<variant>ohem-region|ohem|region|sampler|mmohem))?-(?P<iters>\d+)k"
    r"_(?P<dataset>[a-z0-9]+(?:-[a-z0-9]+)*)-(?P<height>\d+)x(?P<width>\d+)"
)


class Loss(NamedTuple):
    """What a loss is and its settings in effect; None where its class has no such setting."""

    kind: str
    loss_weight: float | None = None
    thresh: float | None = None
    min_kept: float | None = None


class Head(NamedTuple):
    """What a head has: its class, its losses in order, its pixel sampler."""

    kind: str
    losses: tuple[Loss, ...]
    sampler: tuple[str, float, int] | None = None


def ours(weight: float, thresh: float | None = 0.7, min_kept: float = 1 / 16) -> Loss:
    return Loss("OhemCrossEntropyLoss", weight, thresh, min_kept)


def off(weight: float) -> Loss:
    """Ours without mining: every valid pixel is kept."""
    return ours(weight, None, 1.0)


def mmohem(weight: float) -> Loss:
    return Loss("OhemCrossEntropy", weight, 0.9, 131072)


STDC_BOUNDARY = {
    "auxiliary_head.2": Head("STDCHead", (Loss("CrossEntropyLoss", 1.0), Loss("DiceLoss", 1.0)))
}
PIDNET = {
    "": (off(0.4), off(1.0), Loss("BoundaryLoss", 20.0), off(1.0)),
    "ohem": (
        off(0.4),
        ours(1.0, 0.9, 131072),
        Loss("BoundaryLoss", 20.0),
        ours(1.0, 0.9, 131072),
    ),
    "mmohem": (off(0.4), mmohem(1.0), Loss("BoundaryLoss", 20.0), mmohem(1.0)),
}
DDRNET = {
    "": (off(1.0), off(0.4)),
    "ohem": (ours(1.0, 0.9, 131072), ours(0.4, 0.9, 131072)),
    "mmohem": (mmohem(1.0), mmohem(0.4)),
}

# Each family: the heads that mine, as (path, class, loss weight), and the heads that never do.
# PIDHead and DDRHead have their own tables above.
BISENETV2 = [
    ("decode_head", "FCNHead", 1.0),
    *((f"auxiliary_head.{i}", "FCNHead", 1.0) for i in range(4)),
]
MINING: dict[str, list[tuple[str, str, float]]] = {
    "bisenetv2/bisenetv2_fcn": BISENETV2,
    "camvid/bisenetv2_fcn": BISENETV2,
    "camvid/efficientnet-lite0_segformer-head": [("decode_head", "SegformerHead", 1.0)],
    "camvid/efficientnet-lite0-frozen_segformer-head": [("decode_head", "SegformerHead", 1.0)],
    "stdc/stdc1_in1k-pre": [
        ("decode_head", "FCNHead", 1.0),
        ("auxiliary_head.0", "FCNHead", 1.0),
        ("auxiliary_head.1", "FCNHead", 1.0),
    ],
    "deeplabv3plus/deeplabv3plus_r50-d8": [
        ("decode_head", "DepthwiseSeparableASPPHead", 1.0),
        ("auxiliary_head", "FCNHead", 0.4),
    ],
    "pspnet/pspnet_r50-d8": [
        ("decode_head", "PSPHead", 1.0),
        ("auxiliary_head", "FCNHead", 0.4),
    ],
    "hrnet/fcn_hr18s": [("decode_head", "FCNHead", 1.0)],
    "ocrnet/ocrnet_hr18": [
        ("decode_head.0", "FCNHead", 0.4),
        ("decode_head.1", "OCRHead", 1.0),
    ],
    "upernet/swin-tiny-patch4-window7-in1k-pre_upernet": [
        ("decode_head", "UPerHead", 1.0),
        ("auxiliary_head", "FCNHead", 0.4),
    ],
    "segformer/segformer_mit-b0": [("decode_head", "SegformerHead", 1.0)],
    "fastscnn/fast_scnn": [
        ("decode_head", "DepthwiseSeparableFCNHead", 1.0),
        ("auxiliary_head.0", "FCNHead", 0.4),
        ("auxiliary_head.1", "FCNHead", 0.4),
    ],
    "chase_db1/unet-s5-d16_fcn": [
        ("decode_head", "FCNHead", 1.0),
        ("auxiliary_head", "FCNHead", 0.4),
    ],
    "chase_db1/unet-thin_fcn": [("decode_head", "FCNHead", 1.0)],
    "quickstart/unet-tiny": [("decode_head", "FCNHead", 1.0)],
}
POSITIONAL = {
    "pidnet/pidnet-s": ("PIDHead", PIDNET),
    "ddrnet/ddrnet_23-slim_in1k-pre": ("DDRHead", DDRNET),
}
# What has a twin with the region term, and with mining beside it.
REGION = {
    ("camvid/efficientnet-lite0_segformer-head", "camvid"): {"region", "ohem-region"},
    ("camvid/efficientnet-lite0-frozen_segformer-head", "camvid"): {"region", "ohem-region"},
    ("chase_db1/unet-s5-d16_fcn", "chase-db1"): {"region"},
    ("chase_db1/unet-thin_fcn", "chase-db1"): {"region"},
    ("quickstart/unet-tiny", "scenes"): {"region"},
    ("pspnet/pspnet_r50-d8", "cityscapes"): {"region"},
    ("segformer/segformer_mit-b0", "cityscapes"): {"region"},
}
NEVER = {"stdc/stdc1_in1k-pre": STDC_BOUNDARY}
CLASSES = {
    "cityscapes": 19,
    "ade20k": 150,
    "chase-db1": 2,
    "camvid": 11,
}

pytestmark = [
    # mmseg says at every build that its cross-entropy divides by all pixels, and that two classes
    # could be one channel.
    pytest.mark.filterwarnings("ignore:Default ``avg_non_ignore``"),
    pytest.mark.filterwarnings("ignore:For binary segmentation"),
]


def label(path: Path) -> str:
    return path.relative_to(CONFIGS).with_suffix("").as_posix()


def parts(path: Path) -> dict[str, str]:
    match = NAME.fullmatch(path.stem)
    assert match, f"{path.name} does not follow mmseg's naming convention"
    return {key: value or "" for key, value in match.groupdict().items()}


def family(path: Path) -> str:
    return f"{path.parent.name}/{parts(path)['stem']}"


def plain_twin(path: Path) -> Path:
    variant = parts(path)["variant"]
    return path.with_name(path.name.replace(f"-{variant}-", "-")) if variant else path


def expected_heads(path: Path) -> dict[str, Head]:
    name = parts(path)
    variant, key = name["variant"], family(path)
    if key in POSITIONAL:
        kind, losses = POSITIONAL[key]
        return {"decode_head": Head(kind, losses[variant])}
    assert key in MINING, f"{label(path)}: add its heads to the table in {Path(__file__).name}"
    floor = int(name["height"]) * int(name["width"]) // 16
    heads = dict(NEVER.get(key, {}))
    for place, kind, weight in MINING[key]:
        heads[place] = {
            "": Head(kind, (Loss("CrossEntropyLoss", weight),)),
            "ohem": Head(kind, (ours(weight),)),
            "region": Head(kind, (off(weight), Loss("RegionLoss", weight))),
            "ohem-region": Head(kind, (ours(weight), Loss("RegionLoss", weight))),
            "sampler": Head(
                kind, (Loss("CrossEntropyLoss", weight),), ("OHEMPixelSampler", 0.7, floor)
            ),
        }[variant]
    return heads


BENCHMARKS = sorted(
    path
    for path in CONFIGS.rglob("*.yaml")
    if path.name not in ("metafile.yaml", "model-index.yaml")
)


def load(path: Path) -> Config:
    cfg = Config.fromfile(path)
    init_default_scope(cfg.default_scope)
    return cfg


def missing_timm(cfg: Config) -> str:
    """Why the backbone cannot be built here, or ''."""
    if not any(cli.type_name(node) == "TIMMBackbone" for _, node in cli.iter_dicts(cfg.model)):
        return ""
    try:
        importlib.import_module("timm")
    except Exception as error:  # a torchvision that does not fit torch raises RuntimeError
        return f"timm does not import: {error}"
    return ""


def build_heads(cfg: Config, heads_alone: bool = False) -> dict[str, nn.Module]:
    """The heads of the model that the config builds, by their path in it."""
    model = cfg.copy().model
    built: Any
    if missing_timm(cfg) or heads_alone:
        built = {key: model.get(key) for key in ("decode_head", "auxiliary_head")}
        built = {
            key: nn.ModuleList(map(MODELS.build, value))
            if isinstance(value, list)
            else MODELS.build(value)
            for key, value in built.items()
            if value is not None
        }
    else:
        segmentor = MODELS.build(model)
        built = {"decode_head": segmentor.decode_head}
        if segmentor.with_auxiliary_head:
            built["auxiliary_head"] = segmentor.auxiliary_head
    heads = {}
    for key, value in built.items():
        if isinstance(value, nn.ModuleList):
            heads.update({f"{key}.{i}": head for i, head in enumerate(value)})
        else:
            heads[key] = value
    return heads


def describe(head: nn.Module) -> Head:
    losses = head.loss_decode
    losses = losses if isinstance(losses, nn.ModuleList) else [losses]
    described = tuple(
        Loss(
            type(loss).__name__,
            loss.loss_weight,
            getattr(loss, "thresh", None),
            getattr(loss, "min_kept", None),
        )
        for loss in losses
    )
    sampler = head.sampler
    if sampler is not None:
        sampler = (type(sampler).__name__, sampler.thresh, sampler.min_kept)
    return Head(type(head).__name__, described, sampler)


def describe_all(cfg: Config) -> dict[str, Head]:
    return {place: describe(head) for place, head in build_heads(cfg).items()}


def test_there_are_configs() -> None:
    # Each family has a plain twin and two others, so a glob that finds too little shows here.
    families = {(family(path), parts(path)["dataset"]) for path in FILES}
    assert {key for key, _ in families} == {*MINING, *POSITIONAL}
    assert len(FILES) == 3 * len(families) + sum(map(len, REGION.values()))
    region: dict[tuple[str, str], set[str]] = {}
    for path in FILES:
        if "region" in (variant := parts(path)["variant"]):
            region.setdefault((family(path), parts(path)["dataset"]), set()).add(variant)
    assert region == REGION


@pytest.mark.parametrize("path", FILES, ids=label)
def test_each_head_has_its_loss_and_sampler(path: Path) -> None:
    cfg = load(path)
    heads = build_heads(cfg)
    assert {place: describe(head) for place, head in heads.items()} == expected_heads(path)
    for place, head in heads.items():
        if place in NEVER.get(family(path), {}):
            continue
        assert head.num_classes == CLASSES.get(parts(path)["dataset"], head.num_classes)
        assert head.ignore_index == 255
        losses = head.loss_decode if isinstance(head.loss_decode, nn.ModuleList) else []
        for loss in losses or [head.loss_decode]:
            assert not getattr(loss, "use_sigmoid", False)
            if type(loss).__name__ == "OhemCrossEntropyLoss":
                assert isinstance(loss, OhemCrossEntropyLoss)
                assert loss.ignore_index in (None, 255)  # None: the head's, or 255 untold
                assert (loss.pool, loss.min_kept_per, loss.avg) == ("batch", "batch", "kept")
            elif type(loss).__name__ == "OhemCrossEntropy":
                assert loss.ignore_label == 255
            elif type(loss).__name__ == "RegionLoss":
                assert isinstance(loss, RegionLoss)
                assert loss.ignore_index is None
                assert loss.rule == RegionRule(kind="dice")
        if family(path) in POSITIONAL:
            weights = [loss.class_weight for loss in losses if hasattr(loss, "class_weight")]
            assert weights
            assert all(weight is not None and len(weight) == 19 for weight in weights)
    if reason := missing_timm(cfg):
        pytest.skip(f"heads checked, backbone not built: {reason}")


@pytest.mark.parametrize("key", ["bisenetv2/bisenetv2_fcn", "pidnet/pidnet-s"])
def test_a_config_that_sets_models_instead_of_model_is_caught(key: str, tmp_path: Path) -> None:
    path = next(p for p in FILES if family(p) == key and parts(p)["variant"] == "ohem")
    text = path.read_text().replace("./", f"{path.parent}/")
    text, count = re.subn(r"^model = ", "models = ", text, flags=re.MULTILINE)
    assert count == 1
    broken = tmp_path / path.name
    broken.write_text(text)
    assert describe_all(load(broken)) == expected_heads(plain_twin(path)) != expected_heads(path)


# The last two: one channel instead of two, for the losses that want it.
LOSS_KEYS = ("loss_decode", "sampler", "out_channels", "threshold")


def without_loss(cfg: Config) -> dict[str, Any]:
    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: strip(v) for k, v in value.items() if k not in LOSS_KEYS}
        return [strip(item) for item in value] if isinstance(value, list | tuple) else value

    plain = cfg.to_dict()
    plain.pop("custom_imports", None)
    plain.pop("custom_hooks", None)  # FusedOhemHook changes how the loss is computed, not the loss
    plain["model"] = strip(plain["model"])
    return plain


@pytest.mark.parametrize("path", [p for p in FILES if parts(p)["variant"]], ids=label)
def test_twins_differ_in_the_loss_alone(path: Path) -> None:
    assert without_loss(Config.fromfile(path)) == without_loss(Config.fromfile(plain_twin(path)))


@pytest.mark.parametrize("path", FILES, ids=label)
def test_the_name_says_what_is_inside(path: Path) -> None:
    name, cfg = parts(path), Config.fromfile(path)
    crop = (int(name["height"]), int(name["width"]))
    assert cfg.train_dataloader.batch_size == int(name["batch"])
    assert cfg.train_cfg.max_iters == int(name["iters"]) * 1000
    assert cfg.model.data_preprocessor.get("size", crop) == crop
    pipeline = cfg.train_dataloader.dataset.get("pipeline", [])
    crops = [step.crop_size for step in pipeline if step.type == "RandomCrop"]
    assert crops in ([], [crop])
    assert cfg.default_scope == "mmseg"
    if name["variant"] in ("ohem", "region", "ohem-region"):
        assert "ohem_mm" in cfg.custom_imports["imports"]
        assert cfg.custom_imports["allow_failed_imports"] is False
        assert cfg.custom_hooks == [{"type": "FusedOhemHook"}]


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.py")), ids=label)
def test_configs_are_self_contained(path: Path) -> None:
    text = path.read_text()
    assert "::" not in text
    bases = re.search(r"^_base_ = (\[.*?\]|\S+)", text, flags=re.MULTILINE | re.DOTALL)
    for base in re.findall(r"['\"](.+?)['\"]", bases[1]) if bases else []:
        assert base.startswith(".")
        assert (path.parent / base).resolve().is_relative_to(CONFIGS)


@pytest.mark.parametrize("path", [p for p in FILES if not parts(p)["variant"]], ids=label)
def test_everything_around_the_model_builds(path: Path) -> None:
    """Pipelines, optimiser, schedule, hooks and metrics; the twins share them (tested above)."""
    cfg = load(path)
    for split in ("train", "val", "test"):
        loader, loop = cfg[f"{split}_dataloader"], cfg[f"{split}_cfg"]
        assert registry.DATASETS.get(loader.dataset.type)
        assert registry.DATA_SAMPLERS.get(loader.sampler.type)
        assert registry.LOOPS.get(loop.get("type", "IterBasedTrainLoop"))
        for step in loader.dataset.get("pipeline", []):
            registry.TRANSFORMS.build(step)
    for step in cfg.tta_pipeline:
        registry.TRANSFORMS.build(step)
    for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
        registry.METRICS.build(evaluator)
    for hook in [*cfg.default_hooks.values(), *cfg.get("custom_hooks", [])]:
        assert registry.HOOKS.get(hook.type)
    assert registry.VISUALIZERS.get(cfg.visualizer.type)
    for backend in cfg.vis_backends:
        assert registry.VISBACKENDS.get(backend.type)
    assert MODELS.get(cfg.tta_model.type)

    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    schedulers = cfg.param_scheduler
    for scheduler in schedulers if isinstance(schedulers, list) else [schedulers]:
        registry.PARAM_SCHEDULERS.build(scheduler, default_args={"optimizer": wrapper})
    ends = [scheduler.get("end") for scheduler in schedulers]
    assert ends[-1] == cfg.train_cfg.max_iters


def variant_configs(path: Path) -> dict[str, Config]:
    """The config of each variant of a benchmark file."""
    benchmark = load_benchmark(str(path))
    configs = {}
    for name, variant in benchmark.variants.items():
        cfg = load(CONFIGS / variant.config)
        for options in (benchmark.cfg_options, *variant.cfg_options):
            cli.apply_options(cfg, options)
        configs[name] = cfg
    return configs


@pytest.mark.parametrize(
    "path", [p for p in BENCHMARKS if p.parent.name != "quickstart"], ids=label
)
def test_benchmark_variants_train_with_what_they_are_named_after(path: Path) -> None:
    configs = variant_configs(path)
    for name, cfg in configs.items():
        if rate := re.search(r"-(\de-\d)$", name):
            assert cfg.optim_wrapper.optimizer.pop("lr") == float(rate[1])
    around = without_loss(next(iter(configs.values())))
    for name, cfg in configs.items():
        assert without_loss(cfg) == around, name
        height, width = cfg.model.data_preprocessor.size
        for head in build_heads(cfg, heads_alone=True).values():
            losses, sampler = head.loss_decode, head.sampler
            losses = list(losses) if isinstance(losses, torch.nn.ModuleList) else [losses]
            loss = losses[0]
            kinds = [type(one).__name__ for one in losses]
            assert [one.loss_name for one in losses] == list(
                dict.fromkeys(one.loss_name for one in losses)
            )
            if name.startswith(("ours", "hrnet", "thresh=")):
                assert isinstance(loss, OhemCrossEntropyLoss), name
                assert kinds[1:] == ["RegionLoss"] * ("dice" in name), name
                assert sampler is None
                scheduled = "schedule" in name or "late" in name
                assert scheduled == ("OhemScheduleHook" in str(cfg.custom_hooks))
            elif name in ("ce-dice", "ce-dice-quarter", "ce-jaccard"):
                assert kinds == ["OhemCrossEntropyLoss", "RegionLoss"]
                assert (loss.thresh, loss.min_kept) == (None, 1)  # nothing is mined
            else:
                assert kinds == ["CrossEntropyLoss"] + ["DiceLoss"] * ("mmseg-dice" in name), name
                assert (sampler is not None) == name.startswith("sampler"), name
            if "dice" in name or "jaccard" in name:
                assert [one.loss_weight for one in losses] == (
                    [0.25, 0.75] if "jaccard" in name or "quarter" in name else [1, 1]
                )
                if "mmseg" not in name:
                    assert losses[1].rule.kind == ("jaccard" if "jaccard" in name else "dice")
            if sampler is not None:
                assert sampler.min_kept == height * width // 16
                assert sampler.thresh == (None if "topk" in name else 0.7)
            if name == "hrnet":
                assert loss.preset == "hrnet"
                assert loss.min_kept == cfg.train_dataloader.batch_size * height * width // 12
            elif name.startswith("thresh="):
                settings = dict(item.split("=") for item in name.split(","))
                assert f"{loss.thresh}" == settings["thresh"]
                assert f"{loss.min_kept:.3g}" == settings["min_kept"]
                assert loss.avg == settings["avg"]
            elif name.startswith("ours"):
                pool = name[5:] if name[5:] in ("class", "image") else "batch"
                assert (loss.thresh, loss.min_kept, loss.pool, loss.avg) == (
                    0.9 if name.startswith("ours-0.9") else 0.7,
                    1 / 16,
                    pool,
                    "kept",
                )
            assert (
                loss.use_sigmoid == (head.out_channels == 1) == ("bce" in name or "sigmoid" in name)
            )
    steps = [s for s in cfg.train_dataloader.dataset.pipeline if s.type in ("Resize", "RandomCrop")]
    size = steps[-1].get("crop_size") or steps[-1].scale[::-1]
    assert tuple(size) == (height, width)
    assert cfg.param_scheduler[-1].end == cfg.train_cfg.max_iters
    # YAML has no tuples of its own, and mmcv's transforms do not take lists for them.
    results = {
        "img": np.zeros((360, 480, 3), np.uint8),
        "gt_seg_map": np.zeros((360, 480), np.uint8),
        "seg_fields": ["gt_seg_map"],
    }
    results |= dict.fromkeys(("img_shape", "ori_shape"), (360, 480))
    init_default_scope("mmseg")
    for step in cfg.train_dataloader.dataset.pipeline:
        if not step.type.startswith("Load"):
            results = registry.TRANSFORMS.build(step)(results)
    sides = results["inputs"].shape[1:]
    assert sides[0] <= height
    assert sides[1] <= width


def samples(height: int, width: int, classes: int) -> list[SegDataSample]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(2):
        labels = torch.randint(0, classes, (1, height, width), generator=generator)
        labels[:, : height // 4] = 255
        sample = SegDataSample(metainfo={"img_shape": (height, width)})
        sample.gt_sem_seg = PixelData(data=labels)
        edges = torch.randint(0, 2, (1, height, width), generator=generator)
        sample.set_data({"gt_edge_map": PixelData(data=edges)})
        found.append(sample)
    return found


NAMES = {"ohem": ["loss_ohem"], "region": ["loss_ce", "loss_region"]}
CHEAP = ("bisenetv2", "stdc", "pidnet", "ddrnet", "fastscnn", "segformer", "chase_db1")


@pytest.mark.parametrize(
    "path",
    [p for p in FILES if p.parent.name in CHEAP and parts(p)["dataset"] != "ade20k"],
    ids=label,
)
def test_small_models_train_one_step(path: Path) -> None:
    cfg = load(path)
    torch.manual_seed(0)
    model = revert_sync_batchnorm(MODELS.build(cfg.model)).train()
    height, width = 64, 128
    model.data_preprocessor.size = (height, width)
    images = [torch.randint(0, 256, (3, height, width), dtype=torch.uint8) for _ in range(2)]
    classes = CLASSES[parts(path)["dataset"]]
    batch = model.data_preprocessor(
        {"inputs": images, "data_samples": samples(height, width, classes)}, training=True
    )
    losses = model.loss(batch["inputs"], batch["data_samples"])
    total, log = model.parse_losses(losses)
    assert all(torch.isfinite(value).all() for value in log.values()), log
    for variant, names in NAMES.items():
        if parts(path)["variant"] == variant and family(path) in MINING:
            for name in names:
                found = sum(key.endswith(name) for key in losses)
                assert found == len(MINING[family(path)]), name
    total.backward()
    for name, parameter in model.named_parameters():
        if re.search(r"cls_seg|conv_seg", name) and name.endswith("weight"):
            if parameter.grad is None:  # the heads with own classifiers leave conv_seg unused
                assert family(path) in POSITIONAL, name
                continue
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().sum() > 0, name


def write_pair(root: Path, split: str, image: str, label_name: str, value: int) -> None:
    """One black image and a label map full of ``value``."""
    for kind, name, pixels in (
        ("images", image, np.zeros((160, 150, 3), np.uint8)),
        ("annotations", label_name, np.full((160, 150), value, np.uint8)),
    ):
        (root / kind / split).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / kind / split / name)


def labels_read(key: str, split: str, root: Path) -> list[set[int]]:
    """What labels the data set of a config reads under another ``data_root``, image by image."""
    cfg = load(next(p for p in FILES if label(p).startswith(key)))
    cfg[f"{split}_dataloader"].dataset.data_root = str(root)
    dataset = registry.DATASETS.build(cfg[f"{split}_dataloader"].dataset)
    return [set(item["data_samples"].gt_sem_seg.data.unique().tolist()) for item in dataset]


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_chase_db1_reads_both_layouts(suffix: str, tmp_path: Path) -> None:
    for split in ("training", "validation"):
        write_pair(tmp_path, split, f"Image_01L{suffix}", "Image_01L_1stHO.png", 1)
        # The second observer's labels lie beside and are not read.
        write_pair(tmp_path, split, f"Image_01L{suffix}", "Image_01L_2ndHO.png", 0)
    for split in ("train", "val"):
        assert labels_read("chase_db1/", split, tmp_path) == [{1}]


def test_ade20k_ignores_label_0(tmp_path: Path) -> None:
    for value in (0, 1, 150):
        write_pair(tmp_path, "validation", f"{value:03}.jpg", f"{value:03}.png", value)
    key = "pspnet/pspnet_r50-d8_4xb4-80k_ade20k"
    assert labels_read(key, "val", tmp_path) == [{255}, {0}, {149}]


def test_readme_lists_every_config_with_its_numbers() -> None:
    text = (CONFIGS / "README.md").read_text()
    rows = dict(re.findall(r"^\| \[`?([^]`]+)`?\]\([^)]+\) \|.*\| (\d+) \|$", text, re.MULTILINE))
    plain = [path for path in FILES if not parts(path)["variant"]]
    expected = {}
    for path in plain:
        name = parts(path)
        pixels = int(name["batch"]) * int(name["height"]) * int(name["width"])
        expected[label(path)] = str(131072 if family(path) in POSITIONAL else pixels // 16)
    assert rows == expected
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in link:
            assert (CONFIGS / link).exists(), link


def test_metafiles_give_the_means_of_the_records() -> None:
    index = yaml.safe_load((CONFIGS / "model-index.yml").read_text())["Import"]
    assert sorted(index) == [
        f"configs/{label(p)}.yaml" for p in sorted(CONFIGS.glob("*/metafile.yaml"))
    ]
    for file in index:
        folder = (CONFIGS.parent / file).parent
        results = [read_records(path) for path in sorted(folder.glob("*.jsonl"))]
        for model in yaml.safe_load((CONFIGS.parent / file).read_text())["Models"]:
            config = CONFIGS.parent / model["Config"]
            assert config.is_file()
            assert model["Name"] == config.stem
            (result,) = model["Results"]
            ((metric, value),) = result["Metrics"].items()
            # The config as it is, up to its length: no variant with options of its own.
            by_benchmark = [
                [
                    record["metrics"][metric]
                    for record in records
                    if record["config"] == f"{label(config)}.py"
                    and record["variant"] in ("ce", "sampler", "sampler-thresh", "ours")
                    and record["iterations"] == model["Metadata"]["Iterations"]
                    and record.get("tuned") is None
                ]
                for records in results
            ]
            # One benchmark has seeds enough for a mean; a sweep has one.
            (scores,) = [s for s in by_benchmark if len(s) >= 3]
            assert value == pytest.approx(sum(scores) / len(scores), abs=0.006)

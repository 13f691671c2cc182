"""The inspector: every fault that it knows is planted, and clean configs are clean."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from loading import load_tool
from tooling import CE, OHEM, load, one_sentence

from ohem_mm.config import config_path, list_configs

pytest.importorskip("mmseg")
pytest.importorskip("rich")

import mmseg
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from ohem_mm import cli
from ohem_mm.cli import inspection
from ohem_mm.cli.inspection import FINDINGS, Inspector
from ohem_mm.hooks.fused import fuse_heads

pytestmark = [
    pytest.mark.filterwarnings("ignore:Default ``avg_non_ignore``"),
    pytest.mark.filterwarnings("ignore:.*mmcv.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:For binary segmentation"),
]
SAMPLER = "quickstart/unet-tiny_1xb4-sampler-1k_scenes-96x192"
DDRNET = "ddrnet/ddrnet_23-slim_in1k-pre_2xb6-mmohem-120k_cityscapes-1024x1024"
PIDNET = "pidnet/pidnet-s_2xb6-ohem-120k_cityscapes-1024x1024"
PIXELS = 4 * 96 * 192  # of a batch of the quickstart
MMSEG = Path(mmseg.__file__).parent / ".mim" / "configs"
BROKEN = MMSEG / "bisenetv2" / "bisenetv2_fcn_4xb4-ohem-160k_cityscapes-1024x1024.py"


@pytest.fixture
def call(monkeypatch, capsys):
    """Run the tool in this process; return its exit code and stdout."""
    tool = load_tool("inspect_config")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["inspect_config", *map(str, arguments)])
        monkeypatch.setenv("LOCAL_RANK", "0")
        try:
            code = cli.run(tool.main)
        except SystemExit as stop:
            code = stop.code
        return code, capsys.readouterr().out

    return run


@pytest.fixture
def plant(tmp_path):
    """Inspect a shipped config with some lines added to it."""

    def inspect(base, text, name="plain_1xb4-1k_scenes-96x192"):
        path = tmp_path / f"{name}.py"
        path.write_text(f"_base_ = {str(config_path(base))!r}\n{text}\n")
        return Inspector(Config.fromfile(path))

    return inspect


def head(text):
    return f"model = dict(decode_head=dict({text}))"


def loss(text):
    return head(f"loss_decode=dict({text})")


def sampler(text):
    return head(f"sampler=dict({text})")


def places(text):
    """DDRHead, where mmseg's loss works, with settings for its first loss."""
    mmseg = "type='OhemCrossEntropy'"
    return head(f"loss_decode=[dict({mmseg}, {text}), dict({mmseg})]")


ONE_CHANNEL = (
    "num_classes=2, out_channels=1, loss_decode=dict(use_sigmoid=True, class_weight=[1.0])"
)
DICE = "loss_decode=[dict(type={!r}), dict(type='DiceLoss')]"
LOVASZ = "loss_decode=[dict(type='CrossEntropyLoss'), dict(type='LovaszLoss', per_image=True)]"
IGNORES_ZERO = """
train_dataloader = dict(
    dataset=dict(_delete_=True, type='ADE20KDataset', ignore_index=0, pipeline=[])
)
model = dict(data_preprocessor=dict(seg_pad_val=0), decode_head=dict(ignore_index=0))
"""
PADS_ZERO = """
train_dataloader = dict(
    dataset=dict(pipeline=[dict(type='RandomRotate', prob=1, degree=9, seg_pad_val=0)])
)
"""
REGION = "loss_decode=[dict(type='OhemCrossEntropyLoss'), dict(type='RegionLoss')]"
FUSED = "\ncustom_hooks = [dict(type='FusedOhemHook')]"
NO_IMPORT = "\ncustom_imports = dict(imports=['json'])"
# A shipped config, lines added to it, and the names of all findings.
FAULTS = [
    (CE, "models = dict(decode_head=dict(sampler=dict(type='OHEMPixelSampler')))", "lost"),
    (CE, "Model = dict(decode_head=dict(num_classes=3))", "lost"),
    (CE, "ohem = dict(type='OhemCrossEntropyLoss', thresh=0.8)", "lost"),
    (OHEM, "custom_hook = [dict(type='OhemMonitorHook')]", "lost"),
    # Ours: settings that cannot be.
    (OHEM, loss("thresh=1.5"), "bad-setting"),
    (OHEM, loss("preset='mmseg'"), "bad-setting"),
    (OHEM, loss("thres=0.7"), "bad-setting"),
    (OHEM, loss("min_kept=-1"), "bad-setting"),
    (OHEM, loss("class_weight='nowhere.npy'"), "bad-setting"),
    (OHEM, loss("always_keep=[3, 10]"), "always-keep"),
    (OHEM, loss("class_weight=[1.0] * 9"), "class-weight"),
    (OHEM, head("num_classes=2, out_channels=1"), "one-channel"),
    (OHEM, head(ONE_CHANNEL), "class-weight"),
    # Ours: settings that undo each other.
    (OHEM, loss("thresh=None, min_kept=0"), "keeps-nothing"),
    (OHEM, loss("min_kept=1.0"), "thresh-idle"),
    (OHEM, loss("thresh=1.0"), "thresh-idle"),
    (OHEM, loss("thresh=1.0, min_kept=0"), "thresh-idle no-floor"),
    (OHEM, loss(f"min_kept={PIXELS}"), "min-kept-above-batch"),
    (OHEM, loss(f"min_kept={PIXELS // 4}, min_kept_per='image'"), "min-kept-above-batch"),
    (OHEM, loss(f"min_kept={PIXELS // 4}, pool='image'"), "min-kept-above-batch"),
    (OHEM, loss(f"min_kept={PIXELS}, pool='class'"), "min-kept-above-batch"),
    (OHEM, loss(f"min_kept={PIXELS}, pool='world'"), "min-kept-above-batch"),
    (OHEM, loss("min_kept=1"), "one-pixel"),
    (OHEM, loss("reduction='none'"), "reduction"),
    (OHEM, loss("reduction='sum'"), "reduction"),
    (OHEM, loss("loss_weight=0"), "loss-weight"),
    (OHEM, loss("min_kept=0"), "no-floor"),
    (OHEM, loss("thresh=0.1"), "thresh-below-chance"),
    (OHEM, loss("use_sigmoid=True"), "one-vs-rest"),
    (OHEM, loss("min_kept_per='image'"), "unit-idle"),
    (OHEM, loss("avg='all'"), "scaled-gradient"),
    # Ours among other parts.
    (OHEM, sampler("type='OHEMPixelSampler'"), "sampler-beside-loss top-k not-fused"),
    (OHEM, "custom_imports = dict(imports=['json'])", "not-imported"),
    (OHEM, "custom_hooks = None", "could-be-fused"),
    (OHEM, head(DICE.format("OhemCrossEntropyLoss")), "not-fused"),
    (OHEM, head(REGION), "mined-region"),
    (OHEM, head(REGION.replace("Loss'),", "Loss', thresh=None, min_kept=1.0),")), ""),
    (CE, loss("_delete_=True, type='ohem_mm.RegionLoss'") + FUSED, "region-alone"),
    (CE, loss("_delete_=True, type='RegionLoss'") + NO_IMPORT, "not-imported region-alone"),
    (OHEM, head(REGION.replace("Loss')]", "Loss', kind='iou')]")), "bad-setting"),
    (
        OHEM,
        head(REGION.replace("Loss')]", "Loss', classes='all')]")),
        "absent-classes mined-region",
    ),
    (OHEM, head(REGION.replace("Loss')]", "Loss', classes='all', smooth=1.0)]")), "mined-region"),
    (
        OHEM,
        "custom_hooks = [dict(type='FusedOhemHook'), dict(type='OhemScheduleHook')]",
        "schedule",
    ),
    (CE, "custom_hooks = [dict(type='FusedOhemHook')]", "hook-idle"),
    (CE, "custom_hooks = [dict(type='ohem_mm.OhemMonitorHook')]", "hook-idle"),
    # The ignored label.
    (OHEM, loss("ignore_index=254"), "ignore-index not-fused"),
    (OHEM, head("ignore_index=254"), "ignore-index"),
    (OHEM, "model = dict(data_preprocessor=dict(seg_pad_val=0))", "ignore-index"),
    (OHEM, PADS_ZERO, "ignore-index"),
    (OHEM, IGNORES_ZERO, "reduce-zero-label ignored-class"),
    # mmseg's sampler.
    (SAMPLER, "", "scaled-gradient"),
    (SAMPLER, sampler("thresh=None"), "top-k scaled-gradient"),
    (SAMPLER, sampler("min_kept=96 * 192"), "min-kept-above-batch"),
    (SAMPLER, sampler("thresh=1.0"), "thresh-idle"),
    (SAMPLER, sampler("thresh=70"), "bad-sampler"),
    (SAMPLER, sampler("min_kept=1"), "bad-sampler"),
    (SAMPLER, sampler("min_kept=1 / 16"), "bad-sampler"),
    (SAMPLER, sampler("ignore_index=0"), "bad-sampler"),
    (SAMPLER, head("num_classes=2, out_channels=1"), "bad-sampler"),
    (SAMPLER, head(DICE.format("CrossEntropyLoss")), "bad-sampler"),
    (SAMPLER, head(LOVASZ), "sampler-other-loss scaled-gradient"),
    (SAMPLER, loss("loss_name='ce'"), "loss-name scaled-gradient"),
    (SAMPLER, loss("class_weight=[1.0] * 11"), "class-weight scaled-gradient"),
    # mmseg's loss.
    (DDRNET, "", "mmseg-unsafe"),
    (CE, loss("_delete_=True, type='OhemCrossEntropy'"), "mmseg-loss"),
    (DDRNET, places("thresh=0.9"), "mmseg-loss mmseg-unsafe"),
    (DDRNET, places("thres=None"), "mmseg-loss mmseg-unsafe"),
    (DDRNET, places("thres=90"), "mmseg-loss mmseg-unsafe"),
    (DDRNET, places("min_kept=1 / 16"), "mmseg-loss mmseg-unsafe"),
    (DDRNET, places("class_weight='weights.npy'"), "mmseg-loss mmseg-unsafe"),
    (DDRNET, places("thres=1.0"), "thresh-idle mmseg-unsafe"),
    (DDRNET, places("min_kept=6 * 1024**2"), "min-kept-above-batch mmseg-unsafe"),
    (DDRNET, places("ignore_label=254"), "ignore-index mmseg-unsafe"),
    (DDRNET, sampler("type='OHEMPixelSampler'"), "sampler-idle mmseg-unsafe"),
    (DDRNET, head("loss_decode=[dict(type='OhemCrossEntropy')]"), "loss-count mmseg-unsafe"),
    (DDRNET, head("loss_decode=[dict(type='CrossEntropyLoss')] * 2"), "ignored-label"),
    # Names that nobody knows.
    (CE, loss("type='CrossEntropyLos'"), "unknown-type"),
    (OHEM, loss("type='ohem_mm.OhemCrossEntropyLos'"), "unknown-type hook-idle"),
    (CE, head("type='FCNHeadd'"), "unknown-type"),
    (CE, sampler("type='OHEMPixelSample'"), "unknown-type"),
    (OHEM, "custom_hooks = [dict(type='FusedOhemHok')]", "unknown-type could-be-fused"),
    # Heads that do not classify pixels, or leave that to a head of theirs.
    (OHEM, head("type='Mask2FormerHead'"), "other-head"),
    (OHEM, head("type='SideAdapterCLIPHead'"), "other-head"),
    (OHEM, head("type='VPDDepthHead'"), "other-head"),
    (OHEM, head("type='IterativeDecodeHead'"), "other-head"),
    # Hardly a config.
    (CE, "model = dict(_delete_=True, type='EncoderDecoder')", "no-heads"),
]


@pytest.mark.parametrize(("base", "text", "codes"), FAULTS)
def test_each_planted_fault_is_found(plant, base, text, codes):
    size = "1024x1024" if base == DDRNET else "96x192"
    gpus = "2xb6" if base == DDRNET else "1xb4"
    report = plant(base, text, f"plain_{gpus}-1k_data-{size}")
    assert {finding.code for finding in report.findings} == set(codes.split())
    for finding in report.findings:
        assert finding.severity == FINDINGS[finding.code][0]
        assert finding.where
        assert "{" not in finding.what + finding.remedy
    severities = [finding.severity for finding in report.findings]
    assert severities == sorted(severities, key=["error", "warning", "note"].index)


def test_every_finding_is_planted():
    planted = {code for _, _, codes in FAULTS for code in codes.split()}
    # These two need another file name; the tests below plant them.
    assert planted | {"name-says-ohem", "unknown-size"} == set(FINDINGS)


def test_a_name_that_promises_ohem(plant):
    report = plant(CE, "", "unet_1xb4-ohem-1k_scenes-96x192")
    assert [finding.code for finding in report.findings] == ["name-says-ohem"]
    off = plant(OHEM, loss("thresh=None, min_kept=1.0"), "unet_1xb4-ohem-1k_scenes-96x192")
    assert [finding.code for finding in off.findings] == ["name-says-ohem"]
    assert off.rows[0].mines == "off"


@pytest.mark.parametrize(
    ("base", "text"),
    [
        (OHEM, loss("min_kept=5000, pool='world'")),
        (
            OHEM,
            "train_dataloader = dict(dataset=dict(_delete_=True, type='CamVidDataset'))\n"
            + "model = dict(data_preprocessor=dict(size=None),"
            "decode_head=dict(loss_decode=dict(min_kept=5000)))",
        ),
    ],
)
def test_an_unknown_size_is_said(plant, base, text):
    report = plant(base, text, "mine")
    assert [finding.code for finding in report.findings] == ["unknown-size"]
    assert report.rows[0].share is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (sampler("type='OHEMPixelSampler'"), "OHEMPixelSampler needs the upsampled logits"),
        (loss("ignore_index=254"), "acc_seg leaves out the head's ignore_index, 255, and the loss"),
    ],
)
def test_the_reason_why_a_head_is_not_fused(plant, text, reason):
    (found,) = (one for one in plant(OHEM, text).findings if one.code == "not-fused")
    assert reason in found.what


def test_misspelt_types_are_corrected(plant):
    (found,) = plant(CE, loss("type='CrossEntropyLos'")).findings
    assert found.remedy.startswith("did you mean 'CrossEntropyLoss' or ")
    (found,) = plant(CE, loss("type='Nothing'")).findings
    assert "custom_imports" in found.remedy


KNET = MMSEG / "knet" / "knet-s3_r50-d8_fcn_8xb2-adamw-80k_ade20k-512x512.py"


@pytest.mark.skipif(not KNET.is_file(), reason="this mmseg does not ship its configs")
def test_knet_mines_in_its_kernel_generate_head(call):
    settings = ["--cfg-options", "custom_hooks=[dict(type='ohem_mm.FusedOhemHook')]"]
    ours = "loss_decode.type=ohem_mm.OhemCrossEntropyLoss"
    code, out = call(KNET, *settings, f"model.decode_head.kernel_generate_head.{ours}")
    assert code == 0
    assert "decode_head.kernel_generate_head" in out  # not cut off, though no terminal
    code, out = call(KNET, *settings, f"model.decode_head.{ours}")
    assert code == 1
    assert "IterativeDecodeHead has no loss of its own, so this loss does not work in it. " in out


def test_wholly_unknown_classes_do_no_harm(plant):
    text = head("type='my.Head'") + "\ntrain_dataloader = dict(dataset=dict(type='my.Data'))"
    report = plant(OHEM, text)
    assert [(row.mines, row.fused) for row in report.rows] == [("yes", None)]
    assert not report.findings


@pytest.mark.parametrize("name", list_configs())
def test_shipped_configs_are_clean(name):
    report = Inspector(Config.fromfile(config_path(name)))
    assert [finding for finding in report.findings if finding.severity != "note"] == []
    mines = {row.mines for row in report.rows}
    assert ("yes" in mines) == any(word in name for word in ("ohem", "sampler"))
    assert "inert" not in mines
    assert report.batch.pixels()


def facts(name):
    rows = Inspector(Config.fromfile(config_path(name))).rows
    return [
        (row.where, row.rule, row.mines, row.thresh, row.min_kept, row.unit, row.pixels, row.share)
        for row in rows
    ]


def test_rows_of_our_loss():
    name = "bisenetv2/bisenetv2_fcn_4xb4-ohem-160k_cityscapes-1024x1024"
    ours = ("OhemCrossEntropyLoss", "yes", 0.7, 1 / 16, "valid", 4 * 1024 * 1024 // 16, 1 / 16)
    places = ["decode_head", *(f"auxiliary_head.{i}" for i in range(4))]
    assert facts(name) == [(f"{place}.loss_decode", *ours) for place in places]
    report = Inspector(Config.fromfile(config_path(name)))
    assert report.batch == (4, 4, 1024, 1024)
    assert {(row.fused, row.divisor, row.ignore_index) for row in report.rows} == {
        (True, "kept pixels", 255)
    }


def test_rows_of_mmsegs_rules():
    # The sampler counts per image and multiplies by the batch.
    assert facts(SAMPLER) == [
        ("decode_head.loss_decode", "OHEMPixelSampler", "yes", 0.7, 1152, "image", 4608, 1 / 16)
    ]
    mmseg = ("OhemCrossEntropy", "yes", 0.9, 131072, "batch", 131072, 1 / 48)
    assert facts(DDRNET) == [(f"decode_head.loss_decode.{i}", *mmseg) for i in (0, 1)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("min_kept=500", ("batch", 500, 500 / PIXELS)),
        ("min_kept=500, min_kept_per='image'", ("image", 2000, 2000 / PIXELS)),
        ("min_kept=500, pool='image'", ("image", 500, 4 * 500 / PIXELS)),
        ("min_kept=500, pool='class'", ("class", 500, 500 / PIXELS)),
        ("min_kept=500, pool='world'", ("world", 500, 500 / PIXELS / 3)),
        ("min_kept=500, pool='world', min_kept_per='image'", ("image", 6000, 2000 / PIXELS)),
        ("min_kept=0.25, pool='world'", ("valid", 3 * PIXELS // 4, 0.25)),
    ],
)
def test_units_of_min_kept(plant, text, expected):
    row = plant(OHEM, loss(text), "plain_3xb4-1k_scenes-96x192").rows[0]
    assert (row.unit, row.pixels, row.share) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("", (96, 192)),
        ("model = dict(data_preprocessor=dict(size=(128, 160)))", (128, 192)),
        ("crop = dict(pipeline=[dict(type='RandomCrop', crop_size=(64, 32))])", (64, 32)),
        ("crop = dict(pipeline=[dict(type='Resize', scale=(50, 40))])", (40, 50)),
        ("crop = dict(pipeline=[dict(type='Resize', scale=9, keep_ratio=True)])", (96, 192)),
    ],
)
def test_size_of_a_batch(plant, text, size):
    if text.startswith("crop"):
        text += "\ntrain_dataloader = dict(dataset=crop)"
        text += "\nmodel = dict(data_preprocessor=dict(size=(8, 8)))"
    assert plant(OHEM, text).batch[1:] == (4, *size)


@pytest.mark.parametrize("text", ["", sampler("type='OHEMPixelSampler'"), "custom_hooks = None"])
def test_fused_is_what_the_hook_does(plant, text):
    report = plant(OHEM, text)
    init_default_scope("mmseg")
    model = MODELS.build(report.cfg.model)
    fused: list[nn.Module] = []
    fuse_heads(model, fused)
    assert report.rows[0].fused == (bool(fused) and bool(report.cfg.custom_hooks))


def test_heads_that_do_not_tell_the_ignored_label(plant):
    text = head("ignore_index=254, loss_decode=[dict(type='OhemCrossEntropyLoss')] * 2")
    assert {row.ignore_index for row in plant(DDRNET, text).rows} == {255}
    hooked = text + "\ncustom_hooks = [dict(type='FusedOhemHook')]"
    assert {row.ignore_index for row in plant(DDRNET, hooked).rows} == {254}


def test_places_that_the_hook_leaves_out():
    rows = Inspector(Config.fromfile(config_path(PIDNET))).rows
    assert [row.fused for row in rows] == [True, True, None, True]
    assert [row.mines for row in rows] == ["off", "yes", "no", "yes"]


# --- mmseg's own configs ---------------------------------------------------------------------


def shipped_by_mmseg():
    return [path for path in sorted(MMSEG.rglob("*.py")) if "_base_" not in path.parts]


@pytest.mark.skipif(not BROKEN.is_file(), reason="this mmseg does not ship its configs")
def test_mmsegs_broken_config_is_found(call):
    code, out = call(BROKEN)
    assert code == 1
    assert "nothing reads 'models', so what it sets is lost (5 OHEMPixelSampler)" in out
    report = Inspector(Config.fromfile(BROKEN))
    assert [finding.code for finding in report.findings] == ["lost"]
    assert {row.mines for row in report.rows} == {"no"}


def test_mmsegs_other_configs_with_ohem_are_not_accused():
    """All that name OHEM in their own text or that of the STDC base, and a sample of the others."""
    paths = shipped_by_mmseg()
    ohem = [p for p in paths if "stdc" in p.name or "ohem" in p.read_text().lower()]
    ohem = [path for path in ohem if path != BROKEN]
    for path in [*ohem, *paths[::60]]:
        try:
            cfg = Config.fromfile(path)
        except ImportError:  # needs mmdet or mmpretrain
            continue
        report = Inspector(cfg)
        assert [f for f in report.findings if f.severity != "note"] == [], path
        assert report.rows, path
        if path in ohem:
            assert "yes" in {row.mines for row in report.rows}, path
    assert len(ohem) >= 10 or not paths


# --- the command -----------------------------------------------------------------------------


def test_exit_status_and_json(call):
    code, out = call(OHEM, "--json")
    assert code == 0
    report = json.loads(out)
    assert report["findings"] == []
    assert report["batch"] == dict(gpus=1, images=4, height=96, width=192, pixels=PIXELS)
    assert [(one["where"], one["mines"]) for one in report["losses"]] == [
        ("decode_head.loss_decode", "yes")
    ]
    inert = "model.decode_head.loss_decode.min_kept=80000"
    code, out = call(OHEM, "--json", "--cfg-options", inert)
    assert code == 1
    finding = json.loads(out)["findings"][0]
    assert (finding["severity"], finding["code"]) == ("error", "min-kept-above-batch")
    assert finding["what"] == (
        "min_kept is 80,000 pixels and the batch has 73,728, so nothing is ever dropped"
    )
    assert call(SAMPLER, "--json")[0] == 0  # notes alone
    assert call("quickstart/nothing")[0] == 2


def test_the_table(call):
    code, out = call(SAMPLER)
    assert code == 0
    assert "4 images of 96x192 (73,728 pixels)" in out
    for cell in ("decode_head", "OHEMPixelSampler", "1,152", "per image", "4,608", "6.2 %", "255"):
        assert cell in out
    assert "note scaled-gradient: decode_head.sampler: OHEMPixelSampler divides by all" in out
    assert "Nothing to find fault with." in call(OHEM)[1]


def test_sentences_end_once(call):
    _, out = call(OHEM, "--cfg-options", "model.decode_head.loss_decode.preset=hrne")
    assert "Did you mean 'hrnet'? Remedy: correct the setting." in out


# --- before a run ------------------------------------------------------------------------------


def test_double_mining_is_said(elsewhere, capsys):
    sampler = "model.decode_head.sampler=dict(type=OHEMPixelSampler, thresh=0.7)"
    inspection.check(load(OHEM, sampler))
    err = capsys.readouterr().err
    assert "warning: decode_head.sampler: OHEMPixelSampler picks pixels, and Ohem" in err
    assert "again among all of them. Remedy: delete the sampler.\n" in err
    inspection.check(load(OHEM))
    assert capsys.readouterr().err == ""


def test_settings_that_fail_at_the_first_batch_are_refused(elsewhere, tool):
    loss = "model.decode_head.loss_decode"
    for option, expected in (
        (f"{loss}.always_keep=[17]", "always_keep names class 17, but there are 10 classes. "),
        (f"{loss}.class_weight=[1,2,3]", "class_weight has 3 entries, but there are 10 classes. "),
        (f"{loss}.type=OhemCrossEntropyLos", "did you mean 'OhemCrossEntropyLoss'"),
        ("custom_hooks=[dict(type=FusedOhemHok)]", "did you mean 'FusedOhemHook'?"),
        ("custom_hooks=[FusedOhemHook]", "custom_hooks.0 is 'FusedOhemHook', and must be a dict"),
    ):
        code, message = tool("train", OHEM, "--cfg-options", option)
        assert code == 2
        assert one_sentence(message)
        assert expected in message
    assert not Path("work_dirs").exists()

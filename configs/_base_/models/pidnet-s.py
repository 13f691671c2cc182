# PIDNet-S. PIDHead takes a list of four losses and calls each by its place:
#   0  p branch, cross-entropy
#   1  i branch (the prediction)
#   2  d branch, boundaries
#   3  i branch again, only where the d branch sees a boundary (all other labels become 255)
# It hands `ignore_index` to the first one alone and calls no pixel sampler.
#
# mmseg's CrossEntropyLoss cannot stand in places 1 and 3: not being told of label 255, it takes 255
# for a class and fails; in place 0, with `class_weight`, it fails on label 255 under mmseg 1.2.2.
# So the cross-entropy here is ours with mining off: no threshold, and every valid pixel kept.
custom_imports = dict(imports=["ohem_mm"], allow_failed_imports=False)
# Per-class weights as in the authors' code, which took them from OCNet.
class_weight = [
    0.8373, 0.918, 0.866, 1.0345, 1.0166, 0.9969, 0.9754, 1.0489, 0.8786, 1.0023,
    0.9539, 0.9843, 1.1116, 0.9037, 1.0865, 1.0955, 1.0865, 1.1529, 1.0507,
]  # fmt: skip
norm_cfg = dict(type="SyncBN", requires_grad=True)
data_preprocessor = dict(
    type="SegDataPreProcessor",
    mean=[123.675, 116.28, 103.53],
    std=[58.395, 57.12, 57.375],
    bgr_to_rgb=True,
    pad_val=0,
    seg_pad_val=255,
)
model = dict(
    type="EncoderDecoder",
    data_preprocessor=data_preprocessor,
    backbone=dict(
        type="PIDNet",
        in_channels=3,
        channels=32,
        ppm_channels=96,
        num_stem_blocks=2,
        num_branch_blocks=3,
        align_corners=False,
        norm_cfg=norm_cfg,
        act_cfg=dict(type="ReLU", inplace=True),
    ),
    decode_head=dict(
        type="PIDHead",
        in_channels=128,
        channels=128,
        num_classes=19,
        norm_cfg=norm_cfg,
        act_cfg=dict(type="ReLU", inplace=True),
        align_corners=True,
        loss_decode=[
            dict(
                type="OhemCrossEntropyLoss",
                thresh=None,
                min_kept=1.0,
                # The mean is over the sum of the class weights, as torch's cross-entropy has it.
                weighted_mean=True,
                class_weight=class_weight,
                loss_weight=0.4,
                loss_name="loss_ce",
            ),
            dict(
                type="OhemCrossEntropyLoss",
                thresh=None,
                min_kept=1.0,
                class_weight=class_weight,
                loss_weight=1.0,
            ),
            dict(type="BoundaryLoss", loss_weight=20.0),
            dict(
                type="OhemCrossEntropyLoss",
                thresh=None,
                min_kept=1.0,
                class_weight=class_weight,
                loss_weight=1.0,
            ),
        ],
    ),
    train_cfg=dict(),
    test_cfg=dict(mode="whole"),
)

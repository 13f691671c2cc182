# DDRNet-23-slim. DDRHead takes a list of two losses (0: the context logits, which are the
# prediction; 1: the spatial logits), calls both without `ignore_index` and calls no pixel sampler.
#
# mmseg's CrossEntropyLoss cannot stand there: not being told of label 255, it takes 255 for a class
# and fails. So the cross-entropy here is ours with mining off: no threshold, every valid pixel kept.
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
        type="DDRNet",
        in_channels=3,
        channels=32,
        ppm_channels=128,
        norm_cfg=norm_cfg,
        align_corners=False,
    ),
    decode_head=dict(
        type="DDRHead",
        in_channels=128,
        channels=64,
        dropout_ratio=0.0,
        num_classes=19,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=[
            dict(
                type="OhemCrossEntropyLoss",
                thresh=None,
                min_kept=1.0,
                class_weight=class_weight,
                loss_weight=1.0,
            ),
            dict(
                type="OhemCrossEntropyLoss",
                thresh=None,
                min_kept=1.0,
                class_weight=class_weight,
                loss_weight=0.4,
            ),
        ],
    ),
    train_cfg=dict(),
    test_cfg=dict(mode="whole"),
)

_base_ = [
    "../_base_/datasets/scenes_96x192.py",
    "../_base_/schedules/schedule_1k_adamw.py",
    "../_base_/default_runtime.py",
]
custom_imports = dict(imports=["ohem_mm", "ohem_mm.datasets"], allow_failed_imports=False)
randomness = dict(seed=0)

norm_cfg = dict(type="BN", requires_grad=True)
model = dict(
    type="EncoderDecoder",
    data_preprocessor=dict(
        type="SegDataPreProcessor",
        mean=[127.5, 127.5, 127.5],
        std=[63.75, 63.75, 63.75],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
        size=(96, 192),
    ),
    # A U-Net of 0.4 M parameters that works at half the resolution and below.
    backbone=dict(
        type="UNet",
        base_channels=16,
        num_stages=4,
        strides=(2, 1, 1, 1),
        enc_num_convs=(1, 2, 2, 2),
        dec_num_convs=(1, 1, 1),
        downsamples=(True, True, True),
        enc_dilations=(1, 1, 1, 1),
        dec_dilations=(1, 1, 1),
        norm_cfg=norm_cfg,
    ),
    decode_head=dict(
        type="FCNHead",
        in_channels=16,
        in_index=3,
        channels=16,
        num_convs=0,
        concat_input=False,
        dropout_ratio=0,
        num_classes=10,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", loss_weight=1.0),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode="whole"),
)
default_hooks = dict(
    logger=dict(interval=100),
    checkpoint=dict(interval=250, max_keep_ckpts=1),
)
# The flip alone: the net needs sides that are multiples of 16, which other scales are not.
tta_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(
        type="TestTimeAug",
        transforms=[
            [dict(type="RandomFlip", prob=0.0), dict(type="RandomFlip", prob=1.0)],
            [dict(type="LoadAnnotations")],
            [dict(type="PackSegInputs")],
        ],
    ),
]

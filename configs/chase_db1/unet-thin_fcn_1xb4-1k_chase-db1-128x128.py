# A thin U-Net, small enough for a CPU: 0.03 M parameters, three scales, one head.
_base_ = [
    "../_base_/models/unet-s5-d16_fcn.py",
    "../_base_/datasets/chase_db1.py",
    "../_base_/schedules/schedule_1k_adamw.py",
    "../_base_/default_runtime.py",
]
custom_imports = dict(imports=["ohem_mm"], allow_failed_imports=False)
randomness = dict(seed=0)
norm_cfg = dict(type="BN", requires_grad=True)
model = dict(
    data_preprocessor=dict(size=(128, 128), test_cfg=dict(size_divisor=4)),
    backbone=dict(
        base_channels=8,
        num_stages=3,
        strides=(1, 1, 1),
        enc_num_convs=(2, 2, 2),
        dec_num_convs=(2, 2),
        downsamples=(True, True),
        enc_dilations=(1, 1, 1),
        dec_dilations=(1, 1),
        norm_cfg=norm_cfg,
    ),
    decode_head=dict(
        in_channels=8,
        in_index=2,
        channels=8,
        num_convs=1,
        dropout_ratio=0,
        norm_cfg=norm_cfg,
        # mmseg's 0.01 is too small here: the first steps, when everything is background, then give the
        # weights of all eight channels the same sign, and no pixel can ever be called vessel.
        init_cfg=dict(type="Normal", std=0.3, override=dict(name="conv_seg")),
    ),
    auxiliary_head=None,
    test_cfg=dict(_delete_=True, mode="whole"),
)
# CLAHE, because vessels are faint beside the black frame of the image: without it a network this small
# needs many more iterations, and with OHEM it may find no vessel in the first 500. Crops from the image
# as it is: scaling 20 images of a megapixel by random factors would take longer than training.
clahe = dict(type="CLAHE", clip_limit=2.0)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    clahe,
    dict(type="RandomCrop", crop_size=(128, 128), cat_max_ratio=1.0),
    dict(type="RandomFlip", prob=0.5),
    dict(type="RandomFlip", prob=0.5, direction="vertical"),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    clahe,
    dict(type="LoadAnnotations"),
    dict(type="PackSegInputs"),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
del clahe
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
default_hooks = dict(checkpoint=dict(interval=250, max_keep_ckpts=1))

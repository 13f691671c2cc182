checkpoint = (
    "https://mmassets.onedl.ai/mmsegmentation/v0.5/pretrain/stdc/stdc1_20220308-5368626c.pth"
)
_base_ = [
    "../_base_/models/stdc1.py",
    "../_base_/datasets/cityscapes.py",
    "../_base_/default_runtime.py",
    "../_base_/schedules/schedule_80k.py",
]
crop_size = (512, 1024)
model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(
        backbone_cfg=dict(init_cfg=dict(type="Pretrained", checkpoint=checkpoint)),
    ),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, begin=0, end=1000, by_epoch=False),
    dict(type="PolyLR", eta_min=1e-4, power=0.9, begin=1000, end=80000, by_epoch=False),
]
train_dataloader = dict(batch_size=12)
